"""Which operators commute with reading single tokens, and what of their arguments is then read."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.ops import SDPA, SOFTMAX, attention_arguments, is_pointwise, mixes_tokens
from prunepass.passes.state import Rewrite

__all__ = ["LAST", "RESHAPES", "SPLITS", "TO_THE_END", "Edges", "Slots", "edges_of", "sequence_axis"]

aten = torch.ops.aten
TO_THE_END = 2**63 - 1
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_REORDERS = {aten.transpose.int, aten.permute.default}
#: of what `mixes_tokens` knows, what last blocks and final norms are made of
_ALONG_OTHERS = {
    aten.amax.default,
    aten.amin.default,
    aten.cat.default,
    aten.linalg_vector_norm.default,
    aten.mean.dim,
    aten.slice.Tensor,
    aten.sum.dim_IntList,
    aten.var.correction,
    *SOFTMAX,
}
SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
#: what an argument is to the node that reads it: the axis along which both are thinned out
Edges = dict[Node, int]


@dataclass(frozen=True)
class Slots:
    """Tokens that are read: slots [start, end) of the sequence, ``count`` of them; counted from the end if negative."""

    start: int
    end: int
    count: int


LAST = Slots(-1, TO_THE_END, 1)


def edges_of(rewrite: Rewrite, node: Node, place: Slots) -> Edges | None:
    """The arguments to thin out, each along the axis of its tokens, so that ``node`` comes out thinned; None where that
    cannot be said."""
    if node.target in SPLITS:  # several values, which have axes one by one
        return _split_edges(rewrite, node)
    axis = sequence_axis(rewrite, node)
    if axis is None or node.op != "call_function":
        return None
    if node.target is SDPA:
        return _attention_edges(rewrite, node, axis, place)
    rank = len(rewrite.sizes.axes(node) or ())
    if node.target in _REORDERS or (node.target in RESHAPES and place.count == 1):  # a row may have fewer than more
        return _moving_edges(rewrite, node, axis)
    if node.target is aten.linear.default or node.target in _NORMS:
        kept_whole = 1 if node.target is aten.linear.default else len(_sizes(node.args[1]))
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and axis < rank - kept_whole else None
    if node.target is operator.getitem:
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and source.target in SPLITS else None
    if node.target in _ALONG_OTHERS:
        return _edges_along_others(rewrite, node, axis)
    if not is_pointwise(node):
        return None
    edges: Edges = {}
    for source in node.all_input_nodes:
        places = _places(rewrite, source)
        if places is None:
            return None
        aligned = axis - (rank - len(places))
        if sum(places) > 1 or (any(places) and not (aligned >= 0 and places[aligned])):
            return None
        if any(places):
            edges[source] = aligned
    return edges


def _edges_along_others(rewrite: Rewrite, node: Node, axis: int) -> Edges | None:
    """An operator that works along axes other than the sequence, and leaves that where it is. What mixes tokens below a
    cut was refused by `place.Check` before."""
    if mixes_tokens(node, rewrite.sizes) is not None:
        return None
    rank = len(rewrite.sizes.axes(node) or ())
    places = {source: _places(rewrite, source) for source in node.all_input_nodes}
    tensors = {source: at for source, at in places.items() if at != []}  # sizes have no axes
    aligned = [i == axis for i in range(rank)]
    return dict.fromkeys(tensors, axis) if all(at == aligned for at in tensors.values()) else None


def _split_edges(rewrite: Rewrite, node: Node) -> Edges | None:
    """Pieces along another axis."""
    source = node.args[0]
    if not isinstance(source, Node) or mixes_tokens(node, rewrite.sizes) is not None:
        return None
    places = _places(rewrite, source)
    return {source: places.index(True)} if places is not None and sum(places) == 1 else None


def _attention_edges(rewrite: Rewrite, node: Node, axis: int, place: Slots) -> Edges | None:
    """Queries, and the mask where it has a row for each of them. A causal mask inside the kernel counts rows itself, so
    it can be thinned to its last row alone, which is open where there are as many keys."""
    given = attention_arguments(node)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    of_tokens = axis == len(rewrite.sizes.axes(node) or ()) - 2 and sequence_axis(rewrite, key) == axis
    if not of_tokens or (given.get("is_causal") and place != LAST) or query in (key, given["value"]):
        return None
    edges: Edges = {query: axis}
    if isinstance(mask, Node):
        places = _places(rewrite, mask)
        if places is None:
            return None
        if len(places) > 1 and places[-2]:
            edges[mask] = len(places) - 2
    return edges


def _moving_edges(rewrite: Rewrite, node: Node, axis: int) -> Edges | None:
    """Views that leave the sequence a whole axis, wherever they move it."""
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    places = _places(rewrite, source)
    if places is None or sum(places) != 1:
        return None
    if node.target in RESHAPES and len(_sizes(node.args[1])) != len(rewrite.sizes.axes(node) or ()):
        return None
    return {source: places.index(True)}


def sequence_axis(rewrite: Rewrite, node: Node) -> int | None:
    """The one axis of an original node that is the sequence."""
    axes = rewrite.sizes.axes(node) if node in rewrite.sizes.first.values else None
    found = [i for i, axis in enumerate(axes or ()) if axis.follows_length]
    return found[0] if axes is not None and len(found) == 1 and axes[found[0]].is_sequence else None


def _places(rewrite: Rewrite, node: Node) -> list[bool] | None:
    """For each axis whether it is the sequence, nothing for a number; None where it follows the length in some other
    way, or is not known."""
    if any(node is site.narrowed for site in rewrite.sites):
        return [False, True, *([False] * (rewrite.value(rewrite.stream_end).dim() - 2))]
    if node in rewrite.operands:
        return [extent in ("S", "T", "K") for extent in rewrite.operands[node].shape]
    if node not in rewrite.sizes.first.values:
        return None
    axes = rewrite.sizes.axes(node)
    if axes is None:
        return []
    if any(axis.follows_length and not axis.is_sequence for axis in axes):
        return None
    return [axis.is_sequence for axis in axes]


def _sizes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
