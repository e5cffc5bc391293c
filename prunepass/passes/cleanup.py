"""After the rewriting: metadata recomputed, static lengths folded, dead code removed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, map_arg

from prunepass.graph.inputs import fake_value
from prunepass.passes.state import Rewrite

__all__ = ["Cleanup"]


@dataclass(frozen=True)
class Cleanup:
    """Removes what nothing reads any more, gives each new or changed node its fake tensor, and where the caller's lengths
    are plain integers, folds the arithmetic on them: ``sym_size(kept, 1)`` -> ``64``.

    Attributes:
        metadata: whether to recompute fake tensors in a graph of symbolic lengths. That takes longer than all passes
            together and is wasted where the graph is traced again next, as torch.export and Inductor do.
    """

    metadata: bool = True
    name = "cleanup"

    def run(self, rewrite: Rewrite) -> int:
        graph = rewrite.graph
        before = len(graph.nodes)
        graph.eliminate_dead_code()
        lengths = fake_value(rewrite.inputs.tokens).shape[:2]
        if self.metadata or all(isinstance(n, int) for n in lengths):
            _refresh(rewrite)
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


def _refresh(rewrite: Rewrite) -> None:
    """Recompute ``meta["val"]`` of the added nodes and of all that depend on them, in the graph's own fake mode."""
    values = [fake_value(n) for n in rewrite.graph.find_nodes(op="placeholder")]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or FakeTensorMode()
    guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    known: dict[Node, Any] = {}
    changed: set[Node] = set()
    with guards, torch.no_grad():
        for node in rewrite.graph.nodes:
            stale = fake_value(node) is None or any(a in changed for a in node.all_input_nodes)
            if stale and node.op in ("call_function", "get_attr"):
                known[node] = _evaluate(rewrite, node, known, mode)
                node.meta["val"] = known[node]
                node.meta.pop("example_value", None)
                node.meta.pop("tensor_meta", None)
                changed.add(node)
            else:
                known[node] = fake_value(node)


def _evaluate(rewrite: Rewrite, node: Node, known: dict[Node, Any], mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        value: Any = rewrite.gm
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
    assert callable(node.target)
    args, kwargs = map_arg(node.args, known.__getitem__), map_arg(node.kwargs, known.__getitem__)
    with mode:
        return node.target(*args, **kwargs)
