"""Operators of OpenVINO's own that no operator of PyTorch is converted to, and what is rewritten into them.

They are declared to PyTorch so that a graph can name them, and have no kernels: the converter alone reads that graph,
and `extensions` tells it what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from prunepass.backends._openvino_ops import put

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["extensions", "use_own_forms"]

aten = torch.ops.aten
_LIBRARY = torch.library.Library("prunepass_openvino", "DEF")
_LIBRARY.define("reshape(Tensor x, int[] pattern) -> Tensor")
_LIBRARY.define("gather(Tensor x, Tensor index, int axis, int batch_dims) -> Tensor")
_LIBRARY.define("range(Scalar end) -> Tensor")
_own = torch.ops.prunepass_openvino

_VIEWS: set[Any] = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_ARANGES: set[Any] = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_ANDS: set[Any] = {aten.bitwise_and.Tensor, aten.logical_and.default}
#: give values of their first input, in other places
_MOVES: set[Any] = {
    *_VIEWS,
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


def use_own_forms(program: ExportedProgram) -> None:
    """Rewrite the program's graph in place. Each rewriting is exact."""
    graph = program.graph
    _drop_always_true(list(graph.nodes))
    for forms in (_MASKS, _GATHERS, _SIZES):
        for node in list(graph.nodes):
            if (rewrite := forms.get(node.target)) is not None:
                rewrite(node)
        graph.eliminate_dead_code()


def extensions() -> list[Any]:
    """For ``openvino.convert_model``."""
    import numpy
    from openvino import opset13 as ops
    from openvino.frontend.pytorch import ConversionExtension

    def constant(value: Any) -> Any:
        return ops.constant(numpy.array(value, dtype=numpy.int64))

    def reshape(context: Any) -> Any:
        pattern = constant(context.get_values_from_const_input(1))
        return ops.reshape(context.get_input(0), pattern, special_zero=True).outputs()

    def gather(context: Any) -> Any:
        axis, batch_dims = (context.get_values_from_const_input(i) for i in (2, 3))
        return ops.gather(context.get_input(0), context.get_input(1), constant(axis), batch_dims).outputs()

    def count_up(context: Any) -> Any:
        end = ops.squeeze(context.get_input(0), constant(0))
        return ops.range(constant(0), end, constant(1), "i64").outputs()

    made = {"reshape": reshape, "gather": gather, "range": count_up}
    return [ConversionExtension(f"{_own.name}.{name}.default", convert) for name, convert in made.items()]


def _arguments(node: Node) -> Any:
    return node.args


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all lengths. A plain comparison would set what is open."""
    a, b = (s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b))
    return bool(a == b)


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


# -- masks -------------------------------------------------------------------------------------------------------------


def _drop_always_true(nodes: list[Node]) -> None:
    """``(places >= 0) & mask`` -> ``mask``: transformers marks the queries of a bidirectional mask so, and it would be
    gathered at every stage."""
    at_least_zero: set[Node] = set()
    true: set[Node] = set()
    for node in nodes:
        first: Any = node.args[0] if node.args else None
        if node.target in _ARANGES:
            if _from_zero(node):
                at_least_zero.add(node)
        elif node.target in _MOVES:
            for known in (at_least_zero, true):
                if first in known:
                    known.add(node)
        elif node.target is aten.add.Tensor:
            if first in at_least_zero and isinstance(node.args[1], int) and node.args[1] >= 0:
                at_least_zero.add(node)
        elif node.target is aten.ge.Scalar:
            if first in at_least_zero and node.args[1] == 0:
                true.add(node)
        elif node.target is aten.full.default:
            if node.args[1] is True:
                true.add(node)
        elif node.target in _ANDS and true.intersection(node.args):
            others = [a for a in node.args if a not in true]
            if not others:
                true.add(node)
            elif _value(others[0]).dtype == torch.bool:
                _replace_by_expanded(node, others[0])


def _view_of_all(node: Node) -> None:
    """``mask[rows, places]``, [B, 1, 1, 1] of all rows and [1, 1, 1, S] of all places -> ``mask[:, None, None]``."""
    x, index = _arguments(node)
    shape = _value(x).shape
    if len(shape) != 2 or len(index) != 2 or not all(isinstance(i, Node) and _counts_up(i) for i in index):
        return
    rows, places = (_value(i).shape for i in index)
    rank = max(len(rows), len(places))
    ones = [1] * (rank - 1)
    if _same_shape(rows, [shape[0], *ones]) and _same_shape([1] * (rank - len(places)) + [*places], [*ones, shape[1]]):
        form = put(node, _value(node), _own.reshape.default, x, [0, *ones[1:], -1])
        node.replace_all_uses_with(form)


def _counts_up(node: Any) -> bool:
    """Whether a value is 0, 1, 2, ... along its one axis that is not 1."""
    while node.target in (aten.unsqueeze.default, aten.slice.Tensor, aten.add.Tensor):
        if node.target is aten.add.Tensor and node.args[1] != 0:
            return False
        if node.target is aten.slice.Tensor and not _same_shape(_value(node).shape, _value(node.args[0]).shape):
            return False
        node = node.args[0]
    return node.target in _ARANGES and _from_zero(node)


def _from_zero(node: Node) -> bool:
    """Whether an arange is 0, 1, 2, ..."""
    start = () if node.target is aten.arange.default else node.args[:1]
    return start in ((), (0,)) and len(node.args) < 3 and "step" not in node.kwargs


def _replace_by_expanded(node: Node, mask: Any) -> None:
    if not _same_shape(_value(node).shape, _value(mask).shape):
        sizes = [
            size if isinstance(size, int) else put(node, size, aten.sym_size.int, node.args[i], axis)
            for size, (i, axis) in zip(_value(node).shape, _sources(node), strict=True)
        ]
        mask = put(node, _value(node), aten.expand.default, mask, sizes)
    node.replace_all_uses_with(mask)


def _sources(node: Node) -> list[tuple[int, int]]:
    """Which argument of a pointwise node has each of its axes at full size, and where."""
    rank = _value(node).dim()
    found = []
    for axis, size in enumerate(_value(node).shape):
        places = [(i, axis - rank + _value(a).dim()) for i, a in enumerate(node.args)]
        found.append(next((i, at) for i, at in places if at >= 0 and _same(_value(node.args[i]).shape[at], size)))
    return found


def _leave_mask_narrow(node: Node) -> None:
    """Attention spreads its mask over heads and queries by itself."""
    mask: Any = node.args[3] if len(node.args) > 3 else None
    while mask is not None and mask.target is aten.expand.default and _value(mask.args[0]).dim() == 4:
        mask = mask.args[0]
        node.update_arg(3, mask)


# -- gathering ---------------------------------------------------------------------------------------------------------


def _gather_rows(node: Node) -> None:
    """``table.index_select(axis, index.flatten()).unflatten(axis, index.shape)`` -> one Gather; where the table is
    [B * T, ...] and the index carries each row's offset in it, of [B, T, ...] and without the offsets."""
    table, axis, flat = _arguments(node)
    if not isinstance(axis, int) or not isinstance(flat, Node) or flat.target not in _VIEWS:
        return
    index: Any = flat.args[0]
    if _value(index).dim() != 2:
        return
    around = _value(table).shape
    axis %= len(around)
    shape = [*around[:axis], *_value(index).shape, *around[axis + 1 :]]
    for user in list(node.users):
        if user.target not in _VIEWS or not _same_shape(_value(user).shape, shape):
            continue
        form = _without_offsets(table, index) if axis == 0 else (table, index, axis, 0)
        user.replace_all_uses_with(put(user, _value(user), _own.gather.default, *form))


def _without_offsets(table: Any, index: Any) -> tuple[Any, Any, int, int]:
    """(x, rows, axis, batch_dims) such that ``x[b, rows[b, k]]`` is ``table[index[b, k]]``."""
    plain = (table, index, 0, 0)
    if table.target not in _VIEWS or index.target is not aten.add.Tensor:
        return plain
    x = table.args[0]
    batch, length, *rest = _value(x).shape
    for rows, offsets in (index.args, reversed(index.args)):
        if not isinstance(rows, Node) or not isinstance(offsets, Node) or offsets.target is not aten.mul.Tensor:
            continue
        column, step = offsets.args
        if not isinstance(column, Node) or not _same_shape(_value(column).shape, (batch, 1)):
            continue
        size = step.meta["val"] if isinstance(step, Node) else step
        if _counts_up(column) and _same(size, length) and _same_shape(_value(table).shape[1:], rest):
            return x, rows, 1, 1
    return plain


def _gather_alike(node: Node) -> None:
    """``x.gather(axis, index[:, ..., None])``, the same index for all else in a row -> one Gather."""
    x, axis, index = _arguments(node)[:3]
    if not isinstance(index, Node) or not isinstance(axis, int):
        return
    wide: Any = index.args[0] if index.target is aten.expand.default else index
    if wide.target not in _VIEWS:
        return
    rows: Any = wide.args[0]
    axis %= _value(x).dim()
    if axis == 0 or _value(rows).dim() != 2 or not _same(_value(x).shape[0], _value(rows).shape[0]):
        return
    batch, count = _value(rows).shape
    expected = [1] * _value(x).dim()
    expected[0], expected[axis] = batch, count
    shape = [*_value(x).shape]
    shape[axis] = count
    if _same_shape(_value(wide).shape, expected) and _same_shape(_value(node).shape, shape):
        node.replace_all_uses_with(put(node, _value(node), _own.gather.default, x, rows, axis, 1))


# -- sizes -------------------------------------------------------------------------------------------------------------


def _reshape(node: Node) -> None:
    """To a pattern that needs no sizes: 0 for one that stays, -1 for what is left. Sizes as numbers are nodes each, and
    where they are computed the plugin cannot see that they stay."""
    x: Any = node.args[0]
    old, new = (list[Any](_value(n).shape) for n in (x, node))
    if all(isinstance(size, int) for size in new):
        return
    pattern = []
    for i, size in enumerate(new):
        if isinstance(size, int):
            pattern.append(size)
        else:
            pattern.append(0 if i < len(old) and _same(old[i], size) else -1)
    if pattern.count(-1) > 1 or any(size == 0 for size in new if isinstance(size, int)):
        return
    node.replace_all_uses_with(put(node, _value(node), _own.reshape.default, x, pattern))


def _range(node: Node) -> None:
    """Whole numbers from 0, as such: the converter's own form computes them in floating point."""
    end = node.args[0 if node.target is aten.arange.default else 1]
    if _value(node).dtype == torch.int64 and _from_zero(node) and isinstance(end, Node):
        node.replace_all_uses_with(put(node, _value(node), _own.range.default, end))


#: what is rewritten, in this order: a later kind finds what an earlier one has left
_Forms = dict[Any, Callable[[Node], None]]
_MASKS: _Forms = {aten.index.Tensor: _view_of_all, aten.scaled_dot_product_attention.default: _leave_mask_narrow}
_GATHERS: _Forms = {aten.index_select.default: _gather_rows, aten.gather.default: _gather_alike}
_SIZES: _Forms = {**dict.fromkeys(_VIEWS, _reshape), **dict.fromkeys(_ARANGES, _range)}
