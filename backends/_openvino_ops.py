"""What OpenVINO's converter does not know, in other operators. Each rewriting is exact."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from prunepass.backends._ranges import size_range
from prunepass.graph.masks import put

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["spell_out"]

aten = torch.ops.aten
_LIBRARY = torch.library.Library("prunepass_openvino", "FRAGMENT")
_LIBRARY.define("smaller(Scalar a, Scalar b) -> Scalar")
_LIBRARY.define("larger(Scalar a, Scalar b) -> Scalar")
_own = torch.ops.prunepass_openvino


def spell_out(program: ExportedProgram) -> None:
    """Rewrite the program's graph in place."""
    for node in list(program.graph.nodes):
        if node.target is aten.cat.default:
            _drop_empty(node)
        elif node.target is aten.scaled_dot_product_attention.default and node.kwargs.get("enable_gqa"):
            _repeat_heads(node)
        elif node.target is aten.topk.default:
            _take_some(node)
        elif node.target in (torch.sym_min, torch.sym_max):
            _as_own(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _call(before: Node, function: Callable[..., Any], *args: Any) -> Node:
    value = function(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
    return put(before, value, function, *args)


def _drop_empty(node: Node) -> None:
    """``cat([empty, x])`` -> ``cat([x])``: in torch an empty tensor of one axis goes with any other, and a key-value
    cache starts as one."""
    parts: Any = node.args[0]
    filled = [part for part in parts if tuple(part.meta["val"].shape) != (0,)]
    if filled and len(filled) < len(parts):
        node.args = (filled, *node.args[1:])


def _repeat_heads(node: Node) -> None:
    """Attention whose keys and values have fewer heads than the queries: each of them several times."""
    query, key, value, *rest = node.args
    groups = query.meta["val"].shape[1] // key.meta["val"].shape[1]  # type: ignore[union-attr]  # all three are nodes
    if groups > 1:
        key, value = (_call(node, aten.repeat_interleave.self_int, x, groups, 1) for x in (key, value))
    node.args = (query, key, value, *rest)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}


def _take_some(node: Node) -> None:
    """``topk(x, k)`` -> ``topk(x, max(k, 1))[:k]`` where k may be 0, which the runtime's refuses."""
    x, k, *rest = node.args
    if isinstance(k, int) and k > 0:
        return
    if isinstance(k, Node) and size_range(k.meta["val"])[0] >= 1:
        return
    axis = rest[0] if rest else -1
    some = 1 if isinstance(k, int) else _call(node, torch.sym_max, k, 1)
    most = _call(node, aten.topk.default, x, some, *rest)
    if isinstance(some, Node):
        _as_own(some)
    for result in list(node.users):
        part = put(node, most.meta["val"][result.args[1]], operator.getitem, most, result.args[1])
        result.replace_all_uses_with(put(node, result.meta["val"], aten.slice.Tensor, part, axis, 0, k))
        node.graph.erase_node(result)
    node.graph.erase_node(node)


def _as_own(node: Node) -> None:
    """The smaller or larger of two sizes, which the converter does not know: as an operator of the runtime, which works
    out the bounds of what it gives, too."""
    form = _own.smaller if node.target is torch.sym_min else _own.larger
    node.replace_all_uses_with(put(node, node.meta["val"], form.default, *node.args))
    node.graph.erase_node(node)
