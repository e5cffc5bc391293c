"""After the rewriting: metadata recomputed, static lengths folded, dead code removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from prunepass.graph.inputs import fake_value
from prunepass.graph.kinds import is_assertion
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.metadata import metadata_faults, refresh
from prunepass.passes.state import Rewrite

__all__ = ["Cleanup"]


@dataclass(frozen=True)
class Cleanup(Pass):
    """Removes what nothing reads any more, gives each new or changed node its fake tensor, and where the caller's
    lengths are plain integers, folds the arithmetic on them: ``sym_size(kept, 1)`` -> ``64``.

    Attributes:
        metadata: whether to write fake tensors in a graph of symbolic lengths. It is wasted where the graph is traced
            again next, as torch.export and Inductor do.
    """

    metadata: bool = True
    name = "cleanup"

    def run(self, state: Rewrite) -> int:
        """Returns how many nodes went."""
        graph = state.graph
        before = len(graph.nodes)
        graph.eliminate_dead_code()
        if self._writes(state):
            refresh(state)
        for node in list(graph.nodes):
            if node.op != "call_function" or not _is_plain_number(node.meta.get("val")):
                continue
            node.replace_all_uses_with(fake_value(node))
            graph.erase_node(node)
        graph.eliminate_dead_code()
        graph.lint()
        state.gm.recompile()
        return before - len(graph.nodes)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        if tuple(state.graph.find_nodes(op="placeholder")) != state.placeholders:
            yield Fault("The graph takes other inputs than it did.", state.last_placeholder)
        for node in state.graph.nodes:
            if not node.users and not node.is_impure():
                yield Fault("Nothing reads it.", node)
            elif self._writes(state) and _gives_value(node) and fake_value(node) is None:
                yield Fault("It has no metadata.", node)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return metadata_faults(state) if self._writes(state) else iter(())

    def _writes(self, state: Rewrite) -> bool:
        """Whether new and changed nodes get metadata."""
        lengths = fake_value(state.inputs.tokens).shape[:2]
        if state.inputs.fixed_length is not None and state.levels is None:
            return True  # counts are constants then
        return self.metadata or all(isinstance(n, int) for n in lengths)


def _gives_value(node: Node) -> bool:
    return node.op == "call_function" and not is_assertion(node)


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
