"""FLOPs of one ATen call, from the shapes of its arguments.

Counted are contractions, a multiply-add as two: linear, matmul, attention, convolution, einsum. That is the
customary meaning of "FLOPs" in the pruning literature and in `torch.utils.flop_counter`; element-wise work, softmax,
sorts and gathers are not in it. A causal attention counts in full, as there.

All formulas work on ints and on SymInts alike, so one propagation gives the count at every length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from prunepass.graph.experts import EXPERT_LINEAR

__all__ = ["FORMULAS", "Size", "formula_of"]

Size = Any  # int | torch.SymInt; the arithmetic of both is the same
Formula = Callable[..., Size]  # (out, *args, **kwargs of the call) -> FLOPs

aten = torch.ops.aten


def _linear(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Size:
    return 2 * prod(out.shape) * weight.shape[-1]


def _expert_linear(out: Tensor, x: Tensor, *_: Any, **__: Any) -> Size:
    return 2 * prod(out.shape) * x.shape[-1]


def _product(out: Tensor, a: Tensor, *_: Any, **__: Any) -> Size:
    """matmul, mm, bmm, mv, dot: every output element sums over the last axis of ``a``."""
    return 2 * prod(out.shape) * a.shape[-1]


def _add_product(out: Tensor, _added: Tensor, a: Tensor, *_: Any, **__: Any) -> Size:
    return _product(out, a)


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Size:
    """Scores and the weighted sum. Grouped queries: the query's head count is the one that is computed."""
    *batch, queries, width = query.shape
    return 2 * prod(batch) * queries * key.shape[-2] * (width + value.shape[-1])


def _fused_attention(out: tuple[Tensor, ...], query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Size:
    return _attention(out[0], query, key, value)


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Size:
    return 2 * prod(out.shape) * prod(weight.shape[1:])


def _einsum(out: Tensor, equation: str, operands: Sequence[Tensor], **_: Any) -> Size:
    """One multiply-add per point of the joint index space and per operand after the first."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, Size] = {}
    for term, operand in zip(terms, operands, strict=True):
        head, dots, tail = term.partition("...")
        first_of_tail = operand.dim() - len(tail)
        named = [*zip(head, operand.shape, strict=False), *zip(tail, operand.shape[first_of_tail:], strict=True)]
        if dots:
            hidden = operand.shape[len(head) : first_of_tail]
            # Ellipsis axes line up from the right, like any broadcast.
            named += [(f"...{-i}", size) for i, size in enumerate(reversed(hidden))]
        for letter, size in named:
            if not _is_one(size) or letter not in sizes:
                sizes[letter] = size
    return 2 * prod(sizes.values()) * max(1, len(terms) - 1)


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


FORMULAS: dict[Any, Formula] = {
    aten.linear: _linear,
    EXPERT_LINEAR.overloadpacket: _expert_linear,
    aten.matmul: _product,
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.addmm: _add_product,
    aten.addmv: _add_product,
    aten.baddbmm: _add_product,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
    aten._scaled_dot_product_flash_attention: _fused_attention,
    aten._scaled_dot_product_efficient_attention: _fused_attention,
    aten._scaled_dot_product_cudnn_attention: _fused_attention,
    aten._scaled_dot_product_attention_math: _fused_attention,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
}


def _transposable_convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
) -> Size:
    # A transposed convolution scatters every input element; a plain one gathers every output element.
    return 2 * prod((x if transposed else out).shape) * prod(weight.shape[1:])


FORMULAS[aten.convolution] = _transposable_convolution


def formula_of(target: Any) -> Formula | None:
    """The formula of a call's target, or None where the call is no contraction."""
    return FORMULAS.get(getattr(target, "overloadpacket", target))
