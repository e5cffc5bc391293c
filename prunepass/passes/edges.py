"""Which operators commute with reading single tokens, and what of their arguments is then read."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments, is_mutable, is_pointwise, mixes_tokens
from prunepass.passes.state import Rewrite

__all__ = ["LAST", "SIZED", "SPLITS", "TO_THE_END", "Edges", "Slots", "edges_of", "sequence_axis"]

aten = torch.ops.aten
TO_THE_END = 2**63 - 1
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
#: whose second argument says the size of each axis
SIZED = {*_RESHAPES, aten.expand.default}
_REORDERS = {aten.transpose.int, aten.permute.default}
#: made of a value's dtype and sizes that stand beside it, so that thinning the value changes nothing
_NEW = {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
#: which axes it leaves out depends on their sizes, and the tokens' axis may have size 1 once it is thinned
_BY_SIZE = {aten.squeeze.default}
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
    if axis is None or node.op != "call_function" or is_mutable(node):
        return None
    if node.target is SDPA:
        return _attention_edges(rewrite, node, axis, place)
    if node.target in SIZED and place.count > 1:
        return None  # a row may have fewer
    rank = len(rewrite.sizes.axes(node) or ())
    if node.target in _REORDERS or node.target in _RESHAPES:
        return _moving_edges(rewrite, node, axis)
    if node.target is aten.linear.default or node.target in _NORMS:
        kept_whole = 1 if node.target is aten.linear.default else len(_sizes(node.args[1]))
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and axis < rank - kept_whole else None
    if node.target is operator.getitem:
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and source.target in SPLITS else None
    if is_pointwise(node) or node.target is aten.expand.default:
        return _aligned_edges(rewrite, node, axis, rank)
    return _edges_of_tokens(rewrite, node)


def _aligned_edges(rewrite: Rewrite, node: Node, axis: int, rank: int) -> Edges | None:
    """What is broadcast lines up from the last axis on."""
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


def _edges_of_tokens(rewrite: Rewrite, node: Node) -> Edges | None:
    """An operator that leaves tokens apart: each slot of its result is made of the same slot of each argument, wherever
    the axis of the tokens stands in that."""
    if node.target in _NEW | _BY_SIZE or mixes_tokens(node, rewrite.sizes) is not None:
        return None
    edges: Edges = {}
    for source in node.all_input_nodes:
        places = _places(rewrite, source)
        if places is None or sum(places) > 1:
            return None
        if any(places):
            edges[source] = places.index(True)
        elif node.target is not aten.slice.Tensor and _counts_tokens(rewrite, source):
            return None  # a size of the result; a slice may end behind the last slot
    return edges or None


def _counts_tokens(rewrite: Rewrite, node: Node) -> bool:
    """Whether a number follows the length."""
    number = rewrite.sizes.number(node) if node in rewrite.sizes.first.values else None
    return number is not None and number.follows_length


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
    if node.target in _RESHAPES and len(_sizes(node.args[1])) != len(rewrite.sizes.axes(node) or ()):
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
