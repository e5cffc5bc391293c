"""Wide values a part of the tokens at a time: less memory, the same values.

Between a norm and the product that leads back to the residual stream, a feed-forward part holds values several times as
wide as the stream, for all tokens at once. Each token's are made of that token alone, so they are computed for some
tokens after the others, and only the narrow result is held for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.inputs import fake_value, is_symbolic
from prunepass.graph.ops import SDPA, attention_arguments, is_mutable, is_pointwise

__all__ = ["SLICE", "AttendInSlices", "InSlices", "in_slices"]

aten = torch.ops.aten
#: tokens of a slice; rows of fewer than two of them run at once
SLICE = 1024
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


class InSlices(nn.Module):
    """Runs a graph of token-wise operators on `SLICE` tokens at a time.

    Args:
        inner: takes the values that are given, and returns one of shape [B, S, D].
        by_token: for each value that is given whether it is [B, S, ...], to be cut along S; the others are weights.
    """

    def __init__(self, inner: GraphModule, by_token: tuple[bool, ...]) -> None:
        super().__init__()
        self.inner, self.by_token = inner, by_token

    def forward(self, *given: Any) -> Tensor:
        """[B, S, D], in the dtype that ``inner`` gives. With gradients on, all tokens run at once."""
        length = next(x.shape[1] for x, cut in zip(given, self.by_token, strict=True) if cut)
        if length < 2 * SLICE or torch.is_grad_enabled():
            whole: Tensor = self.inner(*given)
            return whole
        out: Tensor | None = None
        for start in range(0, length, SLICE):
            stop = min(start + SLICE, length)
            part = self.inner(*(x[:, start:stop] if cut else x for x, cut in zip(given, self.by_token, strict=True)))
            if out is None:
                out = part.new_empty((part.shape[0], length, *part.shape[2:]))
            out[:, start:stop] = part
            del part  # before the next one is made
        assert out is not None
        return out


class AttendInSlices(nn.Module):
    """Fused attention for `SLICE` queries at a time, on the CPU over the keys alone that one of them sees: half of the
    pairs under a causal mask, ``SLICE + W`` keys a slice under that of a window of W tokens.

    Args:
        options: of the attention, by name, beside queries, keys, values and mask.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[B, H, Q, D] from queries [B, H, Q, D] and a mask [B or 1, H or 1, Q, K]. With gradients on, all at once."""
        length = query.shape[2]
        if length < 2 * SLICE or torch.is_grad_enabled():
            whole: Tensor = SDPA(query, key, value, mask, **self.options)
            return whole
        out: Tensor | None = None
        for start in range(0, length, SLICE):
            rows = slice(start, min(start + SLICE, length))
            seen = mask[:, :, rows]
            keys = _seen_keys(seen) if key.device.type == "cpu" else slice(None)  # elsewhere to ask would wait
            part = SDPA(query[:, :, rows], key[:, :, keys], value[:, :, keys], seen[..., keys], **self.options)
            if out is None:  # as PyTorch's kernels lay it out: each token's heads side by side
                batch, heads, _, width = part.shape
                out = part.new_empty((batch, length, heads, width)).transpose(1, 2)
            out[:, :, rows] = part
            del part
        assert out is not None
        return out


def _seen_keys(mask: Tensor) -> slice:
    """From the first to the last key that a query of a mask [B, H, Q, K] sees; all of them where none is seen."""
    seen = mask.flatten(0, 2).any(0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if mask.shape[3] > 1 and len(seen) else slice(None)


def in_slices(gm: GraphModule) -> GraphModule:
    """A copy of an ATen graph in which each feed-forward part is one `InSlices`, and attention with a row of a mask for
    each query an `AttendInSlices`; ``gm`` itself where there is none, or nothing says how large its values are."""
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    if not any(map(_region, linears)) and not any(map(_is_masked, _attentions(gm))):
        return gm
    copy, _ = copy_with_nodes(gm)
    for number, node in enumerate(_attentions(copy)):
        if _is_masked(node):
            _attend(copy, node, f"attend_in_slices_{number}")
    taken: set[Node] = set()
    for number, end in enumerate(list(copy.graph.find_nodes(op="call_function", target=aten.linear.default))):
        region = _region(end)
        if region and not taken.intersection(region):
            taken.update(region)
            _replace(copy, end, region, f"in_slices_{number}")
    copy.recompile()
    return copy


def _attentions(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=SDPA))


def _is_masked(node: Node) -> bool:
    """Whether an attention has a bool mask with a row for each of many queries."""
    given = attention_arguments(node)
    mask, query = given.get("attn_mask"), _shape(given["query"])
    if (
        not isinstance(mask, Node)
        or query is None
        or len(query) != 4
        or given.get("is_causal")
        or given.get("dropout_p")
    ):
        return False
    rows = _shape(mask)
    if rows is None or len(rows) != 4 or rows[2] != query[2] or fake_value(mask).dtype != torch.bool:
        return False
    return not isinstance(query[2], int) or query[2] >= 2 * SLICE


def _attend(gm: GraphModule, node: Node, name: str) -> None:
    given = attention_arguments(node)
    tensors = tuple(given.pop(name) for name in ("query", "key", "value", "attn_mask"))
    gm.add_submodule(name, AttendInSlices(given))
    with gm.graph.inserting_after(node):
        made = gm.graph.call_module(name, tensors)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)


def _region(end: Node) -> list[Node]:
    """The operators that make the argument of a product which narrows its values, with itself, in order; empty where
    there is no other product among them."""
    size = _tokens(end)
    weight = end.args[1]
    source = end.args[0]
    if size is None or not isinstance(weight, Node) or not isinstance(source, Node):
        return []
    if isinstance(size[1], int) and size[1] < 2 * SLICE:
        return []
    wide, narrow = _shape(source), _shape(end)
    if wide is None or narrow is None or not _is_larger(wide[-1], narrow[-1]):
        return []
    inside = {end}
    todo = [end]
    while todo:
        for a in todo.pop().all_input_nodes:
            if a not in inside and set(a.users) <= inside and _is_token_wise(a, size):
                inside.add(a)
                todo.append(a)
    while stray := {n for n in inside if n is not end and not set(n.users) <= inside}:
        inside -= stray
    others = [n for n in inside if n is not end and n.target is aten.linear.default]
    region = sorted(inside)
    fits = all(_is_given(a, size) for n in region for a in n.all_input_nodes if a not in inside)
    return region if others and fits and _is_token_wise(end, size) else []


def _replace(gm: GraphModule, end: Node, region: list[Node], name: str) -> None:
    """One call in place of a region."""
    inside = set(region)
    given = list(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in inside))
    graph = Graph()
    env: dict[Node, Node] = {a: graph.placeholder(f"given_{i}") for i, a in enumerate(given)}
    for node in region:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[end])
    by_token = tuple(_tokens(a) is not None for a in given)
    gm.add_submodule(name, InSlices(GraphModule({}, graph), by_token))
    with gm.graph.inserting_after(end):
        made = gm.graph.call_module(name, tuple(given))
    made.meta = dict(end.meta)
    end.replace_all_uses_with(made)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _is_token_wise(node: Node, size: tuple[Any, Any]) -> bool:
    """Whether an operator gives [B, S, ...] and works along the last axis at most."""
    if node.op != "call_function" or _tokens(node) != size or is_mutable(node):
        return False
    if node.target is aten.linear.default:
        weights = [a for a in node.all_input_nodes if a is not node.args[0]]
        return all(_tokens(a) is None for a in weights)
    if node.target in _NORMS:
        along: Any = node.args[1]
        return len(along) == 1
    if node.target is aten.mean.dim:
        dims: Any = node.args[1]
        return list(dims) in ([-1], [2]) and len(node.args) > 2 and node.args[2] is True
    # a matrix might line up with the tokens
    return is_pointwise(node) and all(_is_given(a, size) and len(_shape(a) or ()) != 2 for a in node.all_input_nodes)


def _is_given(node: Node, size: tuple[Any, Any]) -> bool:
    """Whether an argument is [B, S, ...] of the same tokens, or a weight: at most a matrix, a value that no token is
    told by."""
    shape = _shape(node)
    if shape is None:
        return False
    if len(shape) == 3:
        return _tokens(node) == size
    return len(shape) <= 1 or (len(shape) == 2 and all(isinstance(n, int) for n in shape))


def _shape(node: Node) -> tuple[Any, ...] | None:
    """Sizes as numbers and expressions, which compare without fixing anything; None of what is no tensor."""
    value = fake_value(node)
    if not isinstance(value, Tensor):
        return None
    return tuple(n.node.expr if is_symbolic(n) else int(n) for n in value.shape)


def _tokens(node: Node) -> tuple[Any, Any] | None:
    """The batch and the length of a value [B, S, D]; None of any other."""
    shape = _shape(node)
    return (shape[0], shape[1]) if shape is not None and len(shape) == 3 else None


def _is_larger(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one > other
