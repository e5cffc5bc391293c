"""What an operator does along the sequence axis: nothing (token-wise), attention, or something that mixes tokens.

Only operators known to be token-wise pass; an unknown one is a reason to refuse, never a guess.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph import picks
from prunepass.graph.experts import EXPERT_LINEAR
from prunepass.graph.kinds import int_argument, is_assertion, kind_of, name_of
from prunepass.graph.picks import axes_of
from prunepass.graph.sinks import SOFTMAX_WITH_SINKS
from prunepass.graph.sizes import AxisKind, Sizes
from prunepass.graph.views import VIEWS, view

__all__ = [
    "PRODUCTS",
    "SDPA",
    "SOFTMAX",
    "attention_arguments",
    "int_argument",
    "is_attention",
    "is_mutable",
    "is_pointwise",
    "mixes_tokens",
    "reads_own_tokens",
]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, SOFTMAX_WITH_SINKS}

_HANDED_ON = {  # the first input again, cast, copied or thinned out
    aten.dropout.default,
    aten.native_dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
}
_NOT_TAGGED = {  # pointwise in effect, though ATen does not say so
    *_HANDED_ON,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.copy.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zero.default,
}
#: by name, as they are registered only once a quantiser is imported. Their ranges are constants; those that are taken
#: from the values (``choose_qparams``) look at all tokens, and stay refused
_QUANTIZING = {
    "quantized_decomposed.quantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_tensor.default",
}


def attention_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a fused attention by name, as far as they are given."""
    return {**dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def is_mutable(node: Node) -> bool:
    """Whether an operator changes one of its arguments in place."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def is_pointwise(node: Node) -> bool:
    """Whether an operator computes each element of its output from the elements in the same place."""
    target = node.target
    if target in _NOT_TAGGED or str(target) in _QUANTIZING:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def is_attention(node: Node, sizes: Sizes) -> bool:
    """Fused attention, or a softmax over the keys of a [..., queries, keys] value."""
    if node.target is SDPA:
        return True
    if node.target not in SOFTMAX:
        return False
    axes = sizes.axes(node)
    if not axes:
        return False
    dim = int_argument(node, 1) % len(axes)
    return dim == len(axes) - 1 and axes[dim].follows_length and sum(a.follows_length for a in axes) > 1


def reads_own_tokens(node: Node, stream: Container[Node]) -> bool:
    """Whether an attention's queries depend on the stream, as its keys may: by where they come from, not by sizes.

    Args:
        node: an attention, see `is_attention`.
        stream: the values that depend on the stream's tokens.
    """
    if node.target is SDPA:
        return attention_arguments(node)["query"] in stream
    products = _products_above(node)
    return not products or any(all(a in stream for a in factors) for factors in products)


def _products_above(softmax: Node) -> list[list[Node]]:
    """The two factors of each product that a softmax's scores are summed from: queries and keys, and terms of
    positions."""
    found = []
    seen, todo = {softmax}, [softmax]
    while todo:
        node = todo.pop()
        if node.target in PRODUCTS:
            operands: Any = node.args[1] if node.target is aten.einsum.default else node.args[-2:]
            found.append([a for a in operands if isinstance(a, Node)])
            continue
        for a in node.all_input_nodes:
            if a not in seen:
                seen.add(a)
                todo.append(a)
    return found


def mixes_tokens(node: Node, sizes: Sizes) -> str | None:
    """Why a node cannot run on a gathered sequence, or None when it is token-wise or attention.

    A node is token-wise when each slot of its output depends on the same slot of its inputs only.
    """
    if not any(_has_sequence(sizes, a) for a in node.all_input_nodes):
        return None
    if node.op == "output" or is_attention(node, sizes) or is_pointwise(node) or is_assertion(node):
        return None
    if any(axis.kind is AxisKind.DERIVED for axis in sizes.axes(node) or ()):
        return _changed_length(node, sizes)
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, sizes)
    kind = kind_of(node)
    if kind is not None:
        return f"{name_of(node)} is {kind}"
    return f"{name_of(node)} is not known to prunepass yet, so whether it leaves tokens apart cannot be told"


def _changed_length(node: Node, sizes: Sizes) -> str:
    kind = kind_of(node)
    if kind is not None:
        return f"{name_of(node)} is {kind} and changes its length"
    sources = [a for a in node.all_input_nodes if sum(axis.follows_length for axis in sizes.axes(a) or ()) > 1]
    if node.target is aten.cat.default and sources:
        return (
            f"{name_of(node)} puts more keys beside the tokens' in the attention scores (attention sinks, a memory), "
            "a layout that is not known to prunepass yet"
        )
    return f"{name_of(node)} changes the length of the sequence"


def _has_sequence(sizes: Sizes, node: Node) -> bool:
    return sizes.number(node) is None and sizes.follows_length(node)


# -- rules: one for each family of operators; each returns the reason to refuse, or None ---------------------------


def _free(node: Node, sizes: Sizes) -> None:
    """Views, and whatever else keeps slots where they are; a changed length was caught before."""


#: what may be done along the batch, as each row stays as it is
_KEEPS_ROWS = ("joins pieces along", "cuts up")


def _no_sequence_in(dims: Callable[[Node, int], list[int]], verb: str) -> Callable[[Node, Sizes], str | None]:
    """Refuse when one of the dims that the operator works along is the sequence of its first input."""

    def rule(node: Node, sizes: Sizes) -> str | None:
        source: Any = node.args[0]
        if isinstance(source, (list, tuple)):
            source = next(a for a in source if isinstance(a, Node))
        axes = axes_of(sizes, source)
        for dim in dims(node, len(axes)):
            axis = axes[dim % len(axes)] if axes else None
            if axis is not None and axis.follows_length:
                return f"{name_of(node)} {verb} the sequence"
            if axis is not None and axis.kind is AxisKind.BATCH and verb not in _KEEPS_ROWS:
                return f"{name_of(node)} {verb} the batch, whose rows keep different tokens"
        return None

    return rule


def _dims(name: str = "dim", default: Any = None) -> Callable[[Node, int], list[int]]:
    """The axes an operator works along: its argument ``name``, wherever its schema has it; all where it is left out."""

    def dims(node: Node, rank: int) -> list[int]:
        assert isinstance(node.target, torch._ops.OpOverload)
        index = [a.name for a in node.target._schema.arguments].index(name)
        value: Any = node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
        if value is None or value == []:
            return list(range(rank))
        return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]

    return dims


def _trailing(node: Node, rank: int) -> list[int]:
    normalized: Any = node.args[1]
    return list(range(rank - len(normalized), rank))


def _slice(node: Node, sizes: Sizes) -> str | None:
    before, after = axes_of(sizes, node.args[0]), axes_of(sizes, node)
    dim = int_argument(node, 1) % len(before) if len(node.args) > 1 else 0
    if not before[dim].follows_length:
        return None
    start = node.args[2] if len(node.args) > 2 else 0
    whole = before[dim] == after[dim] and (start is None or start == 0)
    return None if whole else f"{name_of(node)} cuts a part out of the sequence"


def _contraction(node: Node, sizes: Sizes) -> str | None:
    """A product may sum over tokens only where it applies attention probabilities to values."""
    a, b = (node.args[0], node.args[1]) if node.target not in _ADDED else (node.args[1], node.args[2])
    left, right = axes_of(sizes, a), axes_of(sizes, b)
    inner = right[-2] if len(right) > 1 else right[0]
    sums_tokens = (left and left[-1].follows_length) or inner.follows_length
    if not sums_tokens or _is_probability(a, sizes):
        return None
    return f"{name_of(node)} sums over the sequence outside of attention"


def _einsum(node: Node, sizes: Sizes) -> str | None:
    """``einsum("bqd,bkd->bqk", ...)``: attention probabilities alone may sum a letter of a sequence axis away."""
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        return f"{name_of(node)} is written without '->' or with '...', which is not read"
    terms = list(zip(left.split(","), operands, strict=True))
    keys = {letters[-1] for letters, operand in terms if _is_probability(operand, sizes)}
    for letters, operand in terms:
        for letter, axis in zip(letters, axes_of(sizes, operand), strict=False):
            if axis.follows_length and letter not in right and letter not in keys:
                return f"{name_of(node)} sums over the sequence outside of attention"
    return None


def _batch_norm(node: Node, sizes: Sizes) -> str | None:
    axes = axes_of(sizes, node.args[0])
    if node.args[5]:
        return f"{name_of(node)} in training mode normalises over the tokens of the batch"
    return f"{name_of(node)} has statistics for each position" if len(axes) > 1 and axes[1].follows_length else None


def _linear(node: Node, sizes: Sizes) -> str | None:
    axes = axes_of(sizes, node.args[0])
    return f"{name_of(node)} mixes the sequence by a weight" if axes and axes[-1].follows_length else None


def _is_probability(value: Any, sizes: Sizes) -> bool:
    """Whether a value is a softmax over keys, handed through what keeps zeros and leaves the keys on the last axis."""
    while isinstance(value, Node):
        if is_attention(value, sizes):
            return value.target is not SDPA
        if value.target not in _KEEPS_ZEROS and not _keeps_last_axis(value, sizes):
            return False
        value = value.args[0]
    return False


def _keeps_last_axis(node: Node, sizes: Sizes) -> bool:
    """Whether an operator moves elements about without touching the last axis."""
    if node.target is aten.masked_fill.Scalar:
        return bool(node.args[2] == 0)
    last = len(axes_of(sizes, node)) - 1
    if node.target is aten.transpose.int:
        return last not in {int_argument(node, i) % (last + 1) for i in (1, 2)}
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return bool(order[-1] % (last + 1) == last)
    return node.target in VIEWS and axes_of(sizes, node.args[0])[-1:] == axes_of(sizes, node)[-1:]


_SHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.numpy_T.default,
    aten.mT.default,
}
#: operators that give zero where their first input is zero
_KEEPS_ZEROS = {
    *_HANDED_ON,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    operator.getitem,
}
_ADDED = {aten.addmm.default, aten.baddbmm.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default, *_ADDED}

_RULES: dict[Any, Callable[[Node, Sizes], str | None]] = {
    **dict.fromkeys(_SHAPES, _free),
    **dict.fromkeys(VIEWS, view),
    operator.getitem: _free,
    aten.sym_size.int: _free,
    aten._assert_tensor_metadata.default: _free,
    aten.repeat.default: _free,
    aten.new_empty.default: _free,
    aten.new_zeros.default: _free,
    aten.new_ones.default: _free,
    aten.new_full.default: _free,
    aten.embedding.default: _free,
    aten.view_as_complex.default: _free,
    aten.view_as_real.default: _free,
    **dict.fromkeys(
        (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, *_ADDED), _contraction
    ),
    aten.linear.default: _linear,
    EXPERT_LINEAR: picks.expert_linear,
    aten.einsum.default: _einsum,
    aten.batch_norm.default: _batch_norm,
    aten.roll.default: _no_sequence_in(_dims("dims"), "shifts"),
    aten.slice.Tensor: _slice,
    aten.gather.default: picks.gather,
    aten.index.Tensor: picks.index,
    aten.index_put.default: picks.index_put,
    aten.slice_scatter.default: picks.slice_scatter,
    aten.select_scatter.default: _no_sequence_in(_dims(), "writes one token of"),
    **dict.fromkeys((aten.scatter.value, aten.scatter.src), picks.scatter),
    aten.layer_norm.default: _no_sequence_in(_trailing, "normalises over"),
    aten.native_layer_norm.default: _no_sequence_in(_trailing, "normalises over"),
    aten.rms_norm.default: _no_sequence_in(_trailing, "normalises over"),
    **dict.fromkeys(SOFTMAX, _no_sequence_in(_dims(), "is a softmax over")),
    aten.log_softmax.int: _no_sequence_in(_dims(), "is a softmax over"),
    **dict.fromkeys(
        (aten.cat.default, aten.stack.default), _no_sequence_in(_dims(default=0), "joins pieces along")
    ),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default),
        _no_sequence_in(_dims(default=0), "cuts up"),
    ),
    aten.unbind.int: _no_sequence_in(_dims(default=0), "cuts up"),
    aten.select.int: _no_sequence_in(_dims(), "picks one token out of"),
    aten.index_select.default: _no_sequence_in(_dims(), "picks tokens out of"),
    aten.narrow.default: _no_sequence_in(_dims(), "cuts up"),
    **dict.fromkeys((aten.topk.default,), _no_sequence_in(_dims(default=-1), "sorts")),
    **dict.fromkeys((aten.sort.default, aten.argsort.default), _no_sequence_in(_dims(default=-1), "sorts")),
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
         aten.var_mean.correction, aten.std.correction, aten.std.dim, aten.var.dim, aten.norm.ScalarOpt_dim,
         aten.linalg_vector_norm.default, aten.any.dim, aten.all.dim, aten.max.dim, aten.min.dim, aten.argmax.default,
         aten.prod.dim_int, aten.logsumexp.default),
        _no_sequence_in(_dims(), "pools over"),
    ),
    **dict.fromkeys(
        (aten.cumsum.default, aten.cumprod.default), _no_sequence_in(_dims(), "is a running sum or product over")
    ),
    **dict.fromkeys(
        (aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.any.default, aten.all.default),
        _no_sequence_in(lambda node, rank: list(range(rank)), "pools over"),
    ),
}  # fmt: skip
