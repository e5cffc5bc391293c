"""Operators of OpenVINO's own that no operator of PyTorch is converted to, and what is rewritten into them.

They are declared to PyTorch so that a graph can name them, and have no kernels: the converter alone reads that graph,
and `extensions` tells it what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from prunepass.backends._ranges import LARGEST_SIZE, divisor_of_rest
from prunepass.graph.masks import ARANGES, counts_up, from_zero, put, same, same_shape, simplify_masks

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["extensions", "use_own_forms"]

aten = torch.ops.aten
_LIBRARY = torch.library.Library("prunepass_openvino", "DEF")
_LIBRARY.define("reshape(Tensor x, int[] pattern) -> Tensor")
_LIBRARY.define("gather(Tensor x, Tensor index, int axis, int batch_dims) -> Tensor")
_LIBRARY.define("range(Scalar end) -> Tensor")
_LIBRARY.define("scatter(Tensor x, Tensor index, Tensor src, int axis, bool largest) -> Tensor")
_LIBRARY.define("quotient(Scalar a, Scalar b) -> Scalar")
_own = torch.ops.prunepass_openvino

_VIEWS: set[Any] = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


def use_own_forms(program: ExportedProgram) -> None:
    """Rewrite the program's graph in place. Each rewriting is exact."""
    graph = program.graph
    simplify_masks(graph)
    for forms in (_PLACES, _GATHERS, _SIZES):
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

    def scatter(context: Any) -> Any:
        axis, largest = (context.get_values_from_const_input(i) for i in (3, 4))
        values = (context.get_input(i) for i in range(3))
        return ops.scatter_elements_update(*values, constant(axis), "max" if largest else "none").outputs()

    def floordiv(context: Any) -> Any:
        """Of any size by a positive one, rounded down. The plugin cuts off and divides in float32: what is left over is
        divided again, and tells whether the quotient is one too many or too few."""
        a, b = (ops.convert(context.get_input(i), "i64") for i in (0, 1))
        quotient = ops.divide(a, b)
        for _ in range(2):
            left = ops.subtract(a, ops.multiply(quotient, b))
            quotient = ops.add(quotient, ops.divide(left, b))
        left = ops.subtract(a, ops.multiply(quotient, b))
        less, more = (ops.convert(x, "i64") for x in (ops.less(left, constant(0)), ops.greater_equal(left, b)))
        return ops.add(ops.subtract(quotient, less), more).outputs()

    def whole(context: Any) -> list[Any]:
        return [ops.convert(context.get_input(i), "i64") for i in (0, 1)]

    def smaller(context: Any) -> Any:
        return ops.minimum(*whole(context)).outputs()

    def larger(context: Any) -> Any:
        return ops.maximum(*whole(context)).outputs()

    def quotient(context: Any) -> Any:
        return ops.divide(*whole(context)).outputs()

    made = {"reshape": reshape, "gather": gather, "range": count_up, "scatter": scatter}
    made |= {"floordiv": floordiv, "quotient": quotient, "smaller": smaller, "larger": larger}
    return [ConversionExtension(f"{_own.name}.{name}.default", convert) for name, convert in made.items()]


def _arguments(node: Node) -> Any:
    return node.args


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


# -- masks -------------------------------------------------------------------------------------------------------------


def _view_of_all(node: Node) -> None:
    """``mask[rows, places]``, [B, 1, 1, 1] of all rows and [1, 1, 1, S] of all places -> ``mask[:, None, None]``."""
    x, index = _arguments(node)
    shape = _value(x).shape
    if len(shape) != 2 or len(index) != 2 or not all(isinstance(i, Node) and counts_up(i) for i in index):
        return
    rows, places = (_value(i).shape for i in index)
    rank = max(len(rows), len(places))
    ones = [1] * (rank - 1)
    if same_shape(rows, [shape[0], *ones]) and same_shape([1] * (rank - len(places)) + [*places], [*ones, shape[1]]):
        form = put(node, _value(node), _own.reshape.default, x, [0, *ones[1:], -1])
        node.replace_all_uses_with(form)


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
        if user.target not in _VIEWS or not same_shape(_value(user).shape, shape):
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
        if not isinstance(column, Node) or not same_shape(_value(column).shape, (batch, 1)):
            continue
        size = step.meta["val"] if isinstance(step, Node) else step
        if counts_up(column) and same(size, length) and same_shape(_value(table).shape[1:], rest):
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
    if axis == 0 or _value(rows).dim() != 2 or not same(_value(x).shape[0], _value(rows).shape[0]):
        return
    batch, count = _value(rows).shape
    expected = [1] * _value(x).dim()
    expected[0], expected[axis] = batch, count
    shape = [*_value(x).shape]
    shape[axis] = count
    if same_shape(_value(wide).shape, expected) and same_shape(_value(node).shape, shape):
        node.replace_all_uses_with(put(node, _value(node), _own.gather.default, x, rows, axis, 1))


def _scatter(node: Node) -> None:
    """From a source as large as the index: the converter's own form cuts the source, whatever its size."""
    x, axis, index, src = node.args[:4]
    reduction = node.args[4] if node.target is aten.scatter_reduce.two else "none"
    if node.kwargs or len(node.args) > 5 or reduction not in ("none", "amax"):
        return
    if isinstance(src, Node) and same_shape(_value(src).shape, _value(index).shape):
        form = put(node, _value(node), _own.scatter.default, x, index, src, axis, reduction == "amax")
        node.replace_all_uses_with(form)


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
            pattern.append(0 if i < len(old) and same(old[i], size) else -1)
    if pattern.count(-1) > 1 or any(size == 0 for size in new if isinstance(size, int)):
        return
    node.replace_all_uses_with(put(node, _value(node), _own.reshape.default, x, pattern))


def _range(node: Node) -> None:
    """Whole numbers from 0, as such: the converter's own form computes them in floating point."""
    end = node.args[0 if node.target is aten.arange.default else 1]
    if _value(node).dtype == torch.int64 and from_zero(node) and isinstance(end, Node):
        node.replace_all_uses_with(put(node, _value(node), _own.range.default, end))


def _quotient(node: Node) -> None:
    """``a // b``, of which those are left here that neither have a sign nor leave what float32 holds: the quotient of
    whole numbers has no fraction to round down."""
    _bound_sizes(node)
    node.replace_all_uses_with(put(node, node.meta["val"], _own.quotient.default, *node.args))


def _bound_sizes(node: Node) -> None:
    """Sizes that a quotient is computed from, at most the largest there is: of an open axis OpenVINO takes the largest
    number for a bound, a multiple of which has a sign, and then refuses the graph."""
    for a in node.all_input_nodes:
        if a.target is aten.sym_size.int:
            node.replace_input_with(a, put(node, a.meta["val"], _own.smaller.default, a, LARGEST_SIZE))
        elif a.target in (operator.mul, operator.add, operator.sub, _own.larger.default):
            _bound_sizes(a)


def _rest(node: Node) -> None:
    """``a - (a // d) * d``, whose bounds the runtime works out term by term: in those terms it could have a sign."""
    if divisor_of_rest(*node.args) is not None:
        form = put(node.next, node.meta["val"], _own.larger.default, node, 0)
        node.replace_all_uses_with(form, delete_user_cb=lambda user: user is not form)


#: what is rewritten, in this order: a later kind finds what an earlier one has left
_Forms = dict[Any, Callable[[Node], None]]
_PLACES: _Forms = {aten.index.Tensor: _view_of_all, operator.sub: _rest}
_GATHERS: _Forms = {
    aten.index_select.default: _gather_rows,
    aten.gather.default: _gather_alike,
    aten.scatter.src: _scatter,
    aten.scatter_reduce.two: _scatter,
}
_SIZES: _Forms = {**dict.fromkeys(_VIEWS, _reshape), **dict.fromkeys(ARANGES, _range), operator.floordiv: _quotient}
