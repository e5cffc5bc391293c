"""Whole numbers as PyTorch computes them, where OpenVINO computes others.

OpenVINO keeps the type of what it adds up, so that a sum over flags counts in 8 bits; it saturates where PyTorch wraps;
it cuts quotients off where PyTorch rounds them down; and its CPU plugin divides and compares in float32.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.backends._ranges import Ranges
from prunepass.graph.masks import put

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram

__all__ = ["as_pytorch_counts"]

aten = torch.ops.aten

#: below it float32 has every whole number
_EXACT = 2**24
_ADDED_UP: set[Any] = {aten.cumsum.default, aten.cumprod.default, aten.prod.default, aten.prod.dim_int}
_NARROW = (torch.int8, torch.uint8, torch.int16)
_WRAPPING: set[Any] = {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.abs.default,
}
_WITH_PLACES: set[Any] = {aten.max.dim, aten.min.dim}
_LIMITS: dict[Any, float] = {
    aten.amax.default: -math.inf,
    aten.max.dim: -math.inf,
    aten.amin.default: math.inf,
    aten.min.dim: math.inf,
}
#: which the converter does not know for flags
_ORDERED: set[Any] = {aten.amax.default, aten.amin.default, aten.maximum.default, aten.minimum.default}
_COMPARED: set[Any] = {
    getattr(getattr(aten, kind), overload)
    for kind in ("eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Tensor", "Scalar")
}


_LIBRARY = torch.library.Library("prunepass_openvino", "FRAGMENT")
_LIBRARY.define("floordiv(Scalar a, Scalar b) -> Scalar")
_own = torch.ops.prunepass_openvino


def as_pytorch_counts(program: ExportedProgram) -> None:
    """Rewrite the program's graph in place. Exact within 32 bits, in which the plugin holds 64-bit numbers, too."""
    rewriting = _Rewriting()
    for node in list(program.graph.nodes):
        if (rewrite := rewriting.of(node)) is not None:
            rewrite(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _is_whole(value: Any) -> bool:
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, (int, torch.SymInt))


def _call(before: Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    value = function(*(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)
    made = put(before, value, function, *args)
    made.kwargs = kwargs
    return made


def _cast(before: Node, x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Node) or x.meta["val"].dtype == dtype:
        return x
    return _call(before, aten._to_copy.default, x, dtype=dtype)


class _Rewriting:
    def __init__(self) -> None:
        self._ranges = Ranges()

    def of(self, node: Node) -> Callable[[Node], None] | None:
        """What is to be done with a node."""
        target, value = node.target, node.meta.get("val")
        if target in _LIMITS and node.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]  # a tensor
            return _keep_infinite
        if node.op != "call_function" or not all(map(_is_whole, _numbers(node))):
            return None
        if target in _ADDED_UP:
            return _widen
        if target in _WRAPPING and isinstance(value, Tensor) and value.dtype in _NARROW:
            return _in_32_bits
        if target in _ORDERED and isinstance(value, Tensor) and value.dtype == torch.bool:
            return _in_32_bits
        if target in _COMPARED:
            return self._compare
        return self._divisions().get(target)

    def _divisions(self) -> dict[Any, Callable[[Node], None]]:
        return {
            aten.div.Tensor_mode: self._divide,
            aten.remainder.Tensor: self._take_remainder,
            aten.remainder.Scalar: self._take_remainder,
            aten.fmod.Tensor: self._take_remainder,
            aten.fmod.Scalar: self._take_remainder,
            operator.floordiv: self._divide_sizes,
            operator.mod: self._take_remainder_of_sizes,
        }

    def _is_exact(self, *values: Any) -> bool:
        return all(abs(end) < _EXACT for value in values for end in self._ranges.of(value))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _divide(self, node: Node) -> None:
        a, b = _wide(node)
        mode, dtype = node.kwargs.get("rounding_mode"), node.meta["val"].dtype
        if mode is None or (mode == "trunc" and dtype not in _NARROW and self._is_exact(a, b)):
            return
        quotient = self._floor(node, a, b) if mode == "floor" else self._cut_off(node, a, b)
        _replace(node, _cast(node, quotient, dtype))

    def _take_remainder(self, node: Node) -> None:
        a, b = _wide(node)
        dtype = node.meta["val"].dtype
        if dtype not in _NARROW and self._is_exact(a, b):
            return
        floors = node.target in (aten.remainder.Tensor, aten.remainder.Scalar)
        quotient = self._floor(node, a, b) if floors else self._cut_off(node, a, b)
        _replace(node, _cast(node, _minus(node, a, _times(node, quotient, b)), dtype))

    def _floor(self, before: Node, a: Any, b: Any) -> Node:
        """``a // b``."""
        a, b = self._with_positive_divisor(before, a, b)
        low, high = self._ranges.of(a)
        if low >= 0 and self._is_exact(a, b):
            return _quotient(before, a, b)
        if isinstance(b, int) and self._is_exact(a, b):
            offset = math.ceil(-low / b)
            if high + offset * b < _EXACT:
                moved = _call(before, aten.add.Tensor, a, offset * b)
                return _minus(before, _quotient(before, moved, b), offset)
        return self._corrected(before, a, b)

    def _with_positive_divisor(self, before: Node, a: Any, b: Any) -> tuple[Any, Any]:
        if self._ranges.of(b)[0] >= 0:
            return a, b
        if isinstance(b, int):
            return _call(before, aten.neg.default, a), -b
        # not by a comparison: a kernel of several steps computes all of them in float32 where one of them compares
        sign = self._sign(before, b)
        return _times(before, a, sign), _times(before, b, sign)

    def _sign(self, before: Node, b: Any) -> Node:
        least, most = (put(before, b.meta["val"].new_full((), n), aten.full.default, [], n) for n in (-1, 1))
        for limit in (least, most):
            limit.kwargs = {"dtype": b.meta["val"].dtype}
        return _call(before, aten.maximum.default, _call(before, aten.minimum.default, b, most), least)

    def _corrected(self, before: Node, a: Any, b: Any) -> Node:
        """With a positive ``b``. A quotient of float32 is off by up to 2 ** -22 of itself; what is left over, which
        wraps around exactly, is divided again, and then tells whether the quotient is one too many or too few."""
        quotient = _quotient(before, a, b)
        exact = self._is_exact(a, b)
        if not exact:
            left = _minus(before, a, _times(before, quotient, b))
            quotient = _call(before, aten.add.Tensor, quotient, _quotient(before, left, b))
        left = _minus(before, a, _times(before, quotient, b))
        found = _minus(before, quotient, _as_number(before, _call(before, aten.lt.Scalar, left, 0), quotient))
        if exact:
            return found
        over = _call(before, aten.ge.Scalar, _minus(before, left, b), 0)
        return _call(before, aten.add.Tensor, found, _as_number(before, over, quotient))

    def _cut_off(self, before: Node, a: Any, b: Any) -> Node:
        """The quotient without its fraction: rounded down, and one up again where that went away from zero."""
        if self._is_exact(a, b):
            return _quotient(before, a, b)
        floor = self._floor(before, a, b)
        left = _minus(before, a, _times(before, floor, b))
        below = _call(before, aten.lt.Scalar, floor, 0)
        up = _call(before, aten.bitwise_and.Tensor, below, _call(before, aten.ne.Scalar, left, 0))
        return _call(before, aten.add.Tensor, floor, _as_number(before, up, floor))

    def _compare(self, node: Node) -> None:
        """Two numbers of which neither is small: float32 may hold them for equal, and then their difference tells."""
        a, b = node.args
        if self._is_exact(a) or self._is_exact(b):
            return
        kind = str(node.target).split(".")[1]
        # with an axis in between, so that difference and comparison are no single kernel, which would use float32
        apart = _call(node, aten.unsqueeze.default, _minus(node, a, b), 0)
        decided = _call(node, aten.squeeze.dims, _call(node, getattr(aten, kind).Scalar, apart, 0), [0])
        if kind in ("eq", "ne"):
            _replace(node, decided)
            return
        overload = "Tensor" if isinstance(b, Node) else "Scalar"
        strict, alike = (_call(node, getattr(getattr(aten, k), overload), a, b) for k in (kind.replace("e", "t"), "eq"))
        close = _call(node, aten.bitwise_and.Tensor, alike, decided)
        _replace(node, _call(node, aten.bitwise_or.Tensor, strict, close))

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _divide_sizes(self, node: Node) -> None:
        a, b = node.args
        if (whole := self._floor_sizes(node, a, b)) is not None:
            _replace(node, whole)

    def _take_remainder_of_sizes(self, node: Node) -> None:
        a, b = node.args
        whole = self._floor_sizes(node, a, b) or _call(node, operator.floordiv, a, b)
        _replace(node, _call(node, operator.sub, a, _call(node, operator.mul, whole, b)))

    def _floor_sizes(self, before: Node, a: Any, b: Any) -> Node | None:
        """None where the plugin's own quotient is right."""
        if isinstance(b, int) and b < 0:
            a, b = _call(before, operator.mul, a, -1), -b
        elif self._ranges.of(a)[0] >= 0 and self._is_exact(a, b):
            return None
        value, divisor = a.meta["val"], b.meta["val"] if isinstance(b, Node) else b
        return put(before, value // divisor, _own.floordiv.default, a, b)


def _numbers(node: Node) -> list[Any]:
    """The arguments that are computed with."""
    count = 1 if node.target in _ADDED_UP or node.target in (aten.amax.default, aten.amin.default) else len(node.args)
    return list(node.args[:count])


def _replace(old: Node, new: Node) -> None:
    """By a value of the same type."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _quotient(before: Node, a: Any, b: Any) -> Node:
    return _call(before, aten.div.Tensor_mode, a, b, rounding_mode="trunc")


def _times(before: Node, a: Any, b: Any) -> Node:
    return _call(before, aten.mul.Tensor, a, b)


def _minus(before: Node, a: Any, b: Any) -> Node:
    return _call(before, aten.sub.Tensor, a, b) if isinstance(a, Node) else _call(before, aten.neg.default, b)


def _as_number(before: Node, flag: Node, like: Node) -> Any:
    return _cast(before, flag, like.meta["val"].dtype)


def _keep_infinite(node: Node) -> None:
    """``amax(x)`` -> ``where((x > -inf).any(), amax(x), -inf)``: of infinities alone it is a finite number there."""
    limit = _LIMITS[node.target]
    args: Any = (*node.args, *((), False)[len(node.args) - 1 :])
    x, given, keeps = args
    rank = x.meta["val"].dim()
    axes = {axis % rank for axis in ([given] if isinstance(given, int) else given or range(rank))}
    results = [u for u in node.users if u.args[1] == 0] if node.target in _WITH_PLACES else [node]
    for result in results:
        before, value, readers = result.next, result.meta["val"], list(result.users)
        some = _call(before, (aten.gt if limit < 0 else aten.lt).Scalar, x, limit)
        for axis in sorted(axes, reverse=True):
            some = _call(before, aten.any.dim, some, axis, keeps)
        edge = put(before, value.new_full((), limit), aten.full.default, [], limit)
        edge.kwargs = {"dtype": value.dtype}
        chosen = put(before, value, aten.where.self, some, result, edge)
        for reader in readers:
            reader.replace_input_with(result, chosen)


def _widen(node: Node) -> None:
    """``cumsum(x)`` -> ``cumsum(x as int64)``, which the result is in PyTorch."""
    x: Any = node.args[0]
    if x.meta["val"].dtype != torch.int64 and node.kwargs.get("dtype") is None:
        node.update_arg(0, _cast(node, x, torch.int64))


def _wide(node: Node) -> list[Any]:
    """What a node computes with, in 32 bits where it has fewer: quotients of 8 bits are rounded to the nearest."""
    if node.meta["val"].dtype not in _NARROW:
        return _numbers(node)
    return [_cast(node, x, torch.int32) for x in _numbers(node)]


def _in_32_bits(node: Node) -> None:
    """``x + y`` of 8 bits, which saturates there -> ``(x as int32 + y as int32) as int8``, which wraps."""
    before, numbers = node.next, _numbers(node)
    wide = [_cast(node, x, torch.int32) for x in numbers]
    made = _call(before, node.target, *wide, *node.args[len(numbers) :], **node.kwargs)  # type: ignore[arg-type]  # it is called, so no name
    _replace(node, _cast(before, made, node.meta["val"].dtype))
