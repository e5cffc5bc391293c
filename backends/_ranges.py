"""How large the whole numbers of a graph can get: where that is known, arithmetic that is exact only for small ones may
stay as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

__all__ = ["LARGEST_SIZE", "UNKNOWN", "Interval", "Ranges", "divisor_of_rest", "size_range"]

aten = torch.ops.aten

#: no tensor of a model has an axis longer than this
LARGEST_SIZE = 2**20
Interval = tuple[float, float]
UNKNOWN: Interval = (-float("inf"), float("inf"))

_OF_DTYPE: dict[torch.dtype, Interval] = {
    torch.bool: (0, 1),
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
}
#: give values of their first input
_PASSED_ON: set[Any] = {
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.expand.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
    aten.amax.default,
    aten.amin.default,
}
_ARANGES: set[Any] = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_PLACES: set[Any] = {aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable}


class Ranges:
    """Smallest and largest value of each whole number, as far as the operators tell. Nodes are looked at once."""

    def __init__(self) -> None:
        self._known: dict[Node, Interval] = {}

    def of(self, value: Any) -> Interval:
        """Of a node (a tensor of whole numbers or a size), or of a number itself."""
        if not isinstance(value, Node):
            return (value, value) if isinstance(value, (bool, int)) else UNKNOWN
        if value not in self._known:
            self._known[value] = UNKNOWN  # graphs have no cycles: only for safety
            self._known[value] = self._look(value)
        return self._known[value]

    def _look(self, node: Node) -> Interval:
        meta = node.meta.get("val")
        if not isinstance(meta, Tensor):
            return _meet(size_range(meta), self._of_size(node))
        if meta.is_floating_point():
            return UNKNOWN
        return _meet(self._by_operator(node), _OF_DTYPE.get(meta.dtype, UNKNOWN))

    def _of_size(self, node: Node) -> Interval:
        """Of a size by its operands: its own formula, term by term, tells less of what is left after a division."""
        if node.op != "call_function" or len(node.args) != 2 or node.target not in _OF_SIZES:
            return UNKNOWN
        a, b = node.args
        if node.target is operator.sub and (divisor := divisor_of_rest(a, b)) is not None:
            return 0, divisor - 1
        return _OF_SIZES[node.target](self.of(a), self.of(b))

    def _by_operator(self, node: Node) -> Interval:
        args, target = node.args, node.target
        if node.op != "call_function":
            return UNKNOWN
        if target in _PASSED_ON:
            return self.of(args[0])
        if target in _BINARY and len(args) == 2 and not node.kwargs:
            return _BINARY[target](self.of(args[0]), self.of(args[1]))
        if target is operator.getitem:
            return self._of_result(*args)
        if target in (aten.sum.dim_IntList, aten.cumsum.default):
            return self._summed(node)
        if target in _PLACES:
            return 0, _size(args[0], args[1] if len(args) > 1 and isinstance(args[1], int) else None) - 1
        if target in _ARANGES:
            return self._counted(node)
        if target is aten.where.self:
            return _join(self.of(args[1]), self.of(args[2]))
        if target is aten.clamp.default:
            return self._clamped(*args)
        if target in (aten.full.default, aten.full_like.default):
            return self.of(args[1])
        return UNKNOWN

    def _of_result(self, source: Any, place: Any) -> Interval:
        """Of one of several results: what ``topk`` gives are values of its input, and their places."""
        if source.target is not aten.topk.default:
            return UNKNOWN
        x, _, axis = (*source.args, -1)[:3]
        return self.of(x) if place == 0 else (0, _size(x, axis) - 1)

    def _summed(self, node: Node) -> Interval:
        low, high = self.of(node.args[0])
        axes: Any = node.args[1] if len(node.args) > 1 else None
        axes = [axes] if isinstance(axes, int) else axes
        count = 1.0
        for axis in axes or range(node.args[0].meta["val"].dim()):  # type: ignore[union-attr]  # the summed tensor
            count *= _size(node.args[0], axis)
        return min(low, low * count), max(high, high * count)

    def _counted(self, node: Node) -> Interval:
        start, end = (0, node.args[0]) if node.target is aten.arange.default else node.args[:2]
        step = node.args[2] if len(node.args) > 2 else 1
        ends = (self.of(start), self.of(end))
        if any(
            isinstance(self.of(x)[0], float) and x is not None and self.of(x) == UNKNOWN for x in (start, end, step)
        ):
            return UNKNOWN
        return _join(*ends)

    def _clamped(self, x: Any, least: Any = None, most: Any = None) -> Interval:
        low, high = self.of(x)
        if isinstance(least, int):
            low, high = max(low, least), max(high, least)
        if isinstance(most, int):
            low, high = min(low, most), min(high, most)
        return low, high


def size_range(size: Any) -> Interval:
    """Of a size, by the ranges of its symbols."""
    if isinstance(size, (bool, int)):
        return size, size
    if not isinstance(size, torch.SymInt):
        return UNKNOWN
    known = size.node.shape_env.var_to_range
    ranges = {
        # what was traced with 2 or more runs with 1 as well
        s: ValueRanges(1 if known[s].lower >= 1 else 0, min(LARGEST_SIZE, known[s].upper))
        for s in size.node.expr.free_symbols
    }
    found = bound_sympy(size.node.expr, ranges)
    return float(found.lower), float(found.upper)


def _size(node: Any, axis: int | None) -> float:
    shape = node.meta["val"].shape
    sizes = shape if axis is None else shape[axis : axis + 1 or None]
    total = 1.0
    for size in sizes:
        total *= size_range(size)[1]
    return total


def _join(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), max(a[1], b[1])


def _meet(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), min(a[1], b[1])


def _multiplied(a: Interval, b: Interval) -> Interval:
    ends = [x * y for x in a for y in b if x * y == x * y]  # without 0 * infinity
    return (min(ends), max(ends)) if len(ends) == 4 else UNKNOWN


def _divided(a: Interval, b: Interval) -> Interval:
    # rounding goes one way or the other, and a divisor of 1 keeps all
    most = max(abs(a[0]), abs(a[1])) + 1
    return (0 if a[0] >= 0 and b[0] > 0 else -most), most


def _remainder(a: Interval, b: Interval) -> Interval:
    most = max(abs(b[0]), abs(b[1]))
    return (0 if b[0] > 0 else -most), most


def _floored(a: Interval, b: Interval) -> Interval:
    """By a positive number."""
    return (a[0] // b[0], a[1] // b[0]) if b[0] == b[1] and b[0] > 0 else UNKNOWN


def divisor_of_rest(a: Any, taken: Any) -> int | None:
    """``d`` in ``a - (a // d) * d``; None for any other difference."""
    if not isinstance(taken, Node) or taken.target is not operator.mul:
        return None
    quotient, divisor = taken.args
    if not isinstance(quotient, Node) or quotient.target is not operator.floordiv or not isinstance(divisor, int):
        return None
    return divisor if divisor > 0 and quotient.args == (a, divisor) else None


_BINARY: dict[Any, Callable[[Interval, Interval], Interval]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, operator.add), lambda a, b: (a[0] + b[0], a[1] + b[1])),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, operator.sub), lambda a, b: (a[0] - b[1], a[1] - b[0])),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, operator.mul), _multiplied),
    **dict.fromkeys((aten.maximum.default,), lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
    **dict.fromkeys((aten.minimum.default,), lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
    **dict.fromkeys((aten.floor_divide.default,), _divided),
    **dict.fromkeys((aten.remainder.Tensor, aten.remainder.Scalar), _remainder),
}
_OF_SIZES: dict[Any, Callable[[Interval, Interval], Interval]] = {
    **{target: _BINARY[target] for target in (operator.add, operator.sub, operator.mul)},
    operator.floordiv: _floored,
}
