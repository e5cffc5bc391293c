"""After the rewriting: metadata recomputed, static lengths folded, dead code removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunepass.graph.inputs import fake_value
from prunepass.passes.metadata import refresh
from prunepass.passes.state import Rewrite

__all__ = ["Cleanup"]


@dataclass(frozen=True)
class Cleanup:
    """Removes what nothing reads any more, gives each new or changed node its fake tensor, and where the caller's
    lengths are plain integers, folds the arithmetic on them: ``sym_size(kept, 1)`` -> ``64``.

    Attributes:
        metadata: whether to write fake tensors in a graph of symbolic lengths. It is wasted where the graph is traced
            again next, as torch.export and Inductor do.
    """

    metadata: bool = True
    name = "cleanup"

    def run(self, rewrite: Rewrite) -> int:
        """Returns how many nodes went."""
        graph = rewrite.graph
        before = len(graph.nodes)
        graph.eliminate_dead_code()
        lengths = fake_value(rewrite.inputs.tokens).shape[:2]
        if self.metadata or all(isinstance(n, int) for n in lengths):
            refresh(rewrite)
        for node in list(graph.nodes):
            if node.op != "call_function" or not _is_plain_number(node.meta.get("val")):
                continue
            node.replace_all_uses_with(fake_value(node))
            graph.erase_node(node)
        graph.eliminate_dead_code()
        graph.lint()
        rewrite.gm.recompile()
        return before - len(graph.nodes)


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
