"""Attention masks in their smallest form, before anything is gathered: what is always true goes, what is the same for
all queries keeps one row.

transformers makes a bidirectional mask as "query q may see key k if q is a place, and k is a live one", [B, 1, T, T].
Every stage would gather that by rows and by columns; of [B, 1, 1, T] it gathers the keys alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from prunepass.graph.inputs import fake_value
from prunepass.graph.ops import SDPA

__all__ = ["ARANGES", "counts_up", "from_zero", "put", "same", "same_shape", "simplify_masks"]

aten = torch.ops.aten

ARANGES: set[Any] = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_ANDS: set[Any] = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor}
_CASTS: set[Any] = {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default}
#: give values of their first input, in other places
_MOVES: set[Any] = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.gather.default,
    aten.index_select.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unsqueeze.default,
}
#: what a mask is filled with, by its place among the arguments
_FILLS: dict[Any, int] = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
_ONES: set[Any] = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_MASK = 3  # of attention's arguments


def simplify_masks(graph: Graph) -> int:
    """Rewrite an ATen graph in place, whose nodes have fake tensors. Exact. Returns how many places changed.

    A graph that writes into masks in place keeps their parts: what is written into one may show in another.
    """
    nodes = list(graph.nodes)
    changed = 0 if any(map(_writes_into_mask, nodes)) else _drop_always_true(nodes)
    for node in graph.find_nodes(op="call_function", target=SDPA):
        changed += _leave_narrow(node)
    graph.eliminate_dead_code()
    return changed


def put(before: Node, value: Any, function: Callable[..., Any], *args: Any) -> Node:
    """A call whose ``value`` (sizes and dtype) is known."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(function, args)
    made.meta["val"] = value
    return made


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all lengths. A plain comparison would set what is open."""
    a, b = (s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b))
    return bool(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are, for all lengths."""
    return len(a) == len(b) and all(map(same, a, b))


def counts_up(node: Any) -> bool:
    """Whether a value is 0, 1, 2, ... along its one axis that is not 1."""
    while node.target in (aten.unsqueeze.default, aten.slice.Tensor, aten.add.Tensor):
        if node.target is aten.add.Tensor and node.args[1] != 0:
            return False
        if node.target is aten.slice.Tensor and not same_shape(fake_value(node).shape, fake_value(node.args[0]).shape):
            return False
        node = node.args[0]
    return node.target in ARANGES and from_zero(node)


def from_zero(node: Node) -> bool:
    """Whether an arange is 0, 1, 2, ..."""
    start = () if node.target is aten.arange.default else node.args[:1]
    return start in ((), (0,)) and len(node.args) < 3 and "step" not in node.kwargs


def _drop_always_true(nodes: Sequence[Node]) -> int:
    """``(places >= 0) & mask`` -> ``mask``."""
    at_least_zero: set[Node] = set()
    true: set[Node] = set()
    changed = 0
    for node in nodes:
        first: Any = node.args[0] if node.args else None
        if node.target in ARANGES:
            if from_zero(node):
                at_least_zero.add(node)
        elif node.target in _MOVES:
            for known in (at_least_zero, true):
                if first in known:
                    known.add(node)
        elif node.target in _CASTS:
            if first in true and _is_mask(node):
                true.add(node)
        elif node.target is aten.add.Tensor:
            if first in at_least_zero and isinstance(node.args[1], int) and node.args[1] >= 0 and not node.kwargs:
                at_least_zero.add(node)
        elif node.target is aten.ge.Scalar:
            if first in at_least_zero and node.args[1] == 0:
                true.add(node)
        elif node.target in _FILLS:
            if node.args[_FILLS[node.target]] is True and _is_mask(node):
                true.add(node)
        elif node.target in _ONES:
            if _is_mask(node):
                true.add(node)
        elif node.target in _ANDS and true.intersection(node.args):
            others = [a for a in node.args if a not in true]
            if not others:
                true.add(node)
            elif isinstance(others[0], Node) and _is_mask(others[0]):
                changed += _replace_by_expanded(node, others[0])
    for node in nodes if changed else ():
        if node.target is aten.view.default and _is_mask(node):
            node.target = aten.reshape.default  # what was computed, in one piece, may be an expanded mask now
    return changed


def _writes_into_mask(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    value = fake_value(node)
    return not isinstance(value, Tensor) or not value.is_floating_point()


def _is_mask(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _replace_by_expanded(node: Node, mask: Node) -> bool:
    wide, narrow = fake_value(node), fake_value(mask)
    if not _is_mask(node) or wide.device != narrow.device:
        return False
    new = mask
    if not same_shape(wide.shape, narrow.shape):
        sizes = [
            size if isinstance(size, int) else put(node, size, aten.sym_size.int, node.args[i], axis)
            for size, (i, axis) in zip(wide.shape, _sources(node), strict=True)
        ]
        new = put(node, wide, aten.expand.default, mask, sizes)
    node.replace_all_uses_with(new)
    return True


def _sources(node: Node) -> list[tuple[int, int]]:
    """Which argument of a pointwise node has each of its axes at full size, and where."""
    shape = fake_value(node).shape
    given: Any = node.args
    values = [fake_value(a) for a in given]
    found = []
    for axis, size in enumerate(shape):
        places = [(i, axis - len(shape) + value.dim()) for i, value in enumerate(values)]
        found.append(next((i, at) for i, at in places if at >= 0 and same(values[i].shape[at], size)))
    return found


def _leave_narrow(attention: Node) -> int:
    """Attention spreads its mask over rows, heads and queries by itself."""
    mask: Any = attention.args[_MASK] if len(attention.args) > _MASK else None
    narrow = mask
    while isinstance(narrow, Node) and narrow.target is aten.expand.default and _spreads(narrow):
        narrow = narrow.args[0]
    if narrow is mask:
        return 0
    attention.update_arg(_MASK, narrow)
    return 1


def _spreads(node: Node) -> bool:
    """Whether an expand leaves the last of four axes, the keys, as it is."""
    mask: Any = node.args[0]
    wide, narrow = fake_value(node), fake_value(mask)
    if not isinstance(wide, Tensor) or not isinstance(narrow, Tensor):
        return False
    return wide.dim() == narrow.dim() == 4 and same(wide.shape[-1], narrow.shape[-1])
