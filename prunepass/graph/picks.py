"""Rules for operators that read or write by place: indexing, gathers, scatters, slices that are written."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.kinds import int_argument, name_of
from prunepass.graph.sizes import Axis, AxisKind, Sizes

__all__ = ["axes_of", "expert_linear", "gather", "index", "index_put", "scatter", "slice_scatter"]


def axes_of(sizes: Sizes, node: Any) -> tuple[Axis, ...]:
    """The axes of a node's tensor; none where it is no node, or no tensor."""
    return (sizes.axes(node) or ()) if isinstance(node, Node) else ()


def expert_linear(node: Node, sizes: Sizes) -> str | None:
    """A product with weights chosen by token: token-wise where the choice and the rows are of the same tokens."""
    x, weight, _, experts = (axes_of(sizes, a) for a in node.args[:4])
    if any(a.follows_length for a in (*weight, *x[1:], *experts[1:])) or x[:1] != experts[:1]:
        return f"{name_of(node)} mixes the sequence by a weight"
    return None


def index(node: Node, sizes: Sizes) -> str | None:
    """``x[..., idx]`` along axes of fixed size, or rows of a table without tokens in it: token-wise."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    axes = axes_of(sizes, source)
    for axis, index in zip(axes, indices, strict=False):
        if index is None:
            continue
        if axis.follows_length:
            return f"{name_of(node)} picks tokens out of the sequence"
        if axis.kind is AxisKind.BATCH and any(a.follows_length for a in axes):
            return f"{name_of(node)} picks rows of the batch, which keep different tokens"
        values = [sizes.first.values[index], sizes.second.values[index]]
        if any(v.dtype is torch.bool for v in values):
            return f"{name_of(node)} picks as many elements as its mask says"
        if any(a.follows_length for a in axes) and any(a.follows_length for a in axes_of(sizes, index)):
            return f"{name_of(node)} picks elements of tokens by places of their own, a form not known to prunepass yet"
    return None


def index_put(node: Node, sizes: Sizes) -> str | None:
    """``x[mask] = number``: token-wise; a list of places is not."""
    indices: Any = node.args[1]
    value: Any = node.args[2]
    given = [i for i in indices if i is not None]
    mask, number = sizes.first.values[given[0]], sizes.first.values[value]
    if len(given) == 1 and indices[0] is given[0] and mask.dtype is torch.bool and number.numel() == 1:
        return None
    return f"{name_of(node)} writes to places in the sequence"


def slice_scatter(node: Node, sizes: Sizes) -> str | None:
    axes = axes_of(sizes, node.args[0])
    dim = (int_argument(node, 2) if len(node.args) > 2 else 0) % len(axes)
    return f"{name_of(node)} writes into a part of the sequence" if axes[dim].follows_length else None


def scatter(node: Node, sizes: Sizes) -> str | None:
    axes = axes_of(sizes, node.args[0])
    if axes and axes[int_argument(node, 1) % len(axes)].follows_length:
        return f"{name_of(node)} writes to places in the sequence"
    index = node.args[2]
    same = isinstance(index, Node) and [a for a in axes_of(sizes, index) if a.follows_length] == [
        a for a in axes if a.follows_length
    ]
    return None if same else f"{name_of(node)} writes to a part of the sequence"


def gather(node: Node, sizes: Sizes) -> str | None:
    """``gather(table, dim, index)``: reading along a width by a per-token index is token-wise."""
    axes = axes_of(sizes, node.args[0])
    dim = int_argument(node, 1) % len(axes) if axes else 0
    if axes and axes[dim].follows_length:
        return f"{name_of(node)} picks tokens out of the sequence"
    # an index that is shorter along the sequence reads its first slots only
    return (
        None
        if len(sizes.sequence_axes(node)) >= sum(a.is_sequence for a in axes)
        else f"{name_of(node)} cuts the sequence"
    )
