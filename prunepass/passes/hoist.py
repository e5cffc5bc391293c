"""A head that reads single tokens: what the last block computes for the others is left out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from prunepass.graph.ops import SDPA, SOFTMAX, attention_arguments, is_pointwise, mixes_tokens
from prunepass.passes.state import Rewrite

__all__ = ["HoistReads"]

aten = torch.ops.aten
_TO_THE_END = 2**63 - 1
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
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
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
#: what an argument is to the node that reads it: the axis along which both are thinned out
_Edges = dict[Node, int]


@dataclass(frozen=True)
class _Place:
    """Tokens that are read: slots [start, end) of the sequence, ``count`` of them; counted from the end if negative."""

    start: int
    end: int
    count: int


_LAST = _Place(-1, _TO_THE_END, 1)


@dataclass(frozen=True)
class HoistReads:
    """``f(x)[:, i]`` -> ``f(x[:, i : i + 1])``, from the reads of the head up through the last block.

    After its attention a token's way is its own, and so are its queries: with a [CLS] head the last block needs keys
    and values of all tokens, and everything else of one. The values read stay what they were. Nothing is done where
    the reads differ, or where an operator is not known to commute with them: the slice then stands below it.
    """

    #: whether attention may have fewer queries than keys
    fewer_queries: bool = True
    name: ClassVar[str] = "hoist"

    def run(self, rewrite: Rewrite) -> int:
        """Returns the number of nodes that work on fewer tokens now."""
        rewrite.graph.eliminate_dead_code()  # a pooler that nobody reads reads, too
        reads = [n for n in rewrite.graph.nodes if n.name in rewrite.protected_reads]
        places = {_place(n) for n in reads}
        place = places.pop() if len(places) == 1 else None
        if not rewrite.reads_protected or place is None:
            return 0
        thinned: dict[Node, _Edges] = {}
        for node in reversed(rewrite.graph.nodes):
            if node not in reads and self._may(node) and _is_thinned(rewrite, node, thinned, reads):
                edges = _edges(rewrite, node, place)
                if edges is not None:
                    thinned[node] = edges
        for node in [n for n in thinned if n.target is operator.getitem and n.args[0] not in thinned]:
            del thinned[node]  # another piece is needed whole: this one is sliced by those that read it
        if not thinned:
            return 0
        self._rewrite(rewrite, place, thinned, reads)
        return len(thinned)

    def _may(self, node: Node) -> bool:
        return self.fewer_queries or node.target is not SDPA

    def _rewrite(self, rewrite: Rewrite, place: _Place, thinned: dict[Node, _Edges], reads: list[Node]) -> None:
        slices: dict[tuple[Node, int], Node] = {}
        for node, edges in thinned.items():
            for source, axis in edges.items():
                if source not in thinned:
                    if (source, axis) not in slices:
                        slices[source, axis] = self._slice(rewrite, node, source, axis, place)
                    node.replace_input_with(source, slices[source, axis])
            if node.target in _RESHAPES:
                shape: Any = node.args[1]
                at = _sequence_axis(rewrite, node)
                assert at is not None
                node.args = (node.args[0], [*shape[:at], place.count, *shape[at + 1 :]])
            if node.target is SDPA and attention_arguments(node).get("is_causal"):
                _see_all(node)
            rewrite.level[node] = 0  # the length of its level is not its length any more
        for read in reads:
            if read.args[0] in thinned:
                first = 0 if read.target is aten.select.int else None
                rest = () if first == 0 else (None,)
                read.args = (read.args[0], read.args[1], first, *rest)

    def _slice(self, rewrite: Rewrite, before: Node, source: Node, axis: int, place: _Place) -> Node:
        with rewrite.graph.inserting_after(source):
            made = rewrite.graph.call_function(aten.slice.Tensor, (source, axis, place.start, place.end))
        made.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
        made.meta["prunepass"] = {"stage": rewrite.sites[-1].index, "pass": self.name}
        return made


def _place(read: Node) -> _Place | None:
    """Where a read that `passes.reads` noted takes its tokens from."""
    start: Any = read.args[2] if len(read.args) > 2 else 0
    start = 0 if start is None else start
    if read.target is aten.select.int:
        return _Place(start, start + 1 if start != -1 else _TO_THE_END, 1)
    end: Any = read.args[3] if len(read.args) > 3 else None
    if start < 0:
        return _Place(start, _TO_THE_END, -start)
    return _Place(start, end, end - start) if isinstance(end, int) else None


def _is_thinned(rewrite: Rewrite, node: Node, thinned: dict[Node, _Edges], reads: list[Node]) -> bool:
    """Whether all users ask for the read tokens of ``node`` only, along the axis that its tokens lie on; checks of its
    dtype ask for none."""
    users = [user for user in node.users if not _checks_dtype(user)]
    whole = node.args[0] if node.target in _SPLITS else node
    axis = _sequence_axis(rewrite, whole) if isinstance(whole, Node) else None
    return bool(users) and all(u in reads or (u in thinned and thinned[u].get(node) == axis) for u in users)


def _checks_dtype(node: Node) -> bool:
    if node.target is not aten._assert_tensor_metadata.default:
        return False
    size_or_stride = (*node.args[1:3], node.kwargs.get("size"), node.kwargs.get("stride"))
    return all(value is None for value in size_or_stride)


def _edges(rewrite: Rewrite, node: Node, place: _Place) -> _Edges | None:
    """The arguments to thin out, each along the axis of its tokens, so that ``node`` comes out thinned; None where that
    cannot be said."""
    if node.target in _SPLITS:  # several values, which have axes one by one
        return _split_edges(rewrite, node)
    axis = _sequence_axis(rewrite, node)
    if axis is None or node.op != "call_function":
        return None
    if node.target is SDPA:
        return _attention_edges(rewrite, node, axis, place)
    rank = len(rewrite.sizes.axes(node) or ())
    if node.target in _REORDERS or (node.target in _RESHAPES and place.count == 1):  # a row may have fewer than more
        return _moving_edges(rewrite, node, axis)
    if node.target is aten.linear.default or node.target in _NORMS:
        kept_whole = 1 if node.target is aten.linear.default else len(_sizes(node.args[1]))
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and axis < rank - kept_whole else None
    if node.target is operator.getitem:
        source = node.args[0]
        return {source: axis} if isinstance(source, Node) and source.target in _SPLITS else None
    if node.target in _ALONG_OTHERS:
        return _edges_along_others(rewrite, node, axis)
    if not is_pointwise(node):
        return None
    edges: _Edges = {}
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


def _edges_along_others(rewrite: Rewrite, node: Node, axis: int) -> _Edges | None:
    """An operator that works along axes other than the sequence, and leaves that where it is. What mixes tokens below a
    cut was refused by `place.Check` before."""
    if mixes_tokens(node, rewrite.sizes) is not None:
        return None
    rank = len(rewrite.sizes.axes(node) or ())
    places = {source: _places(rewrite, source) for source in node.all_input_nodes}
    tensors = {source: at for source, at in places.items() if at != []}  # sizes have no axes
    aligned = [i == axis for i in range(rank)]
    return dict.fromkeys(tensors, axis) if all(at == aligned for at in tensors.values()) else None


def _split_edges(rewrite: Rewrite, node: Node) -> _Edges | None:
    """Pieces along another axis."""
    source = node.args[0]
    if not isinstance(source, Node) or mixes_tokens(node, rewrite.sizes) is not None:
        return None
    places = _places(rewrite, source)
    return {source: places.index(True)} if places is not None and sum(places) == 1 else None


def _attention_edges(rewrite: Rewrite, node: Node, axis: int, place: _Place) -> _Edges | None:
    """Queries, and the mask where it has a row for each of them. A causal mask inside the kernel counts rows itself, so
    it can be thinned to its last row alone, which is open where there are as many keys."""
    given = attention_arguments(node)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    of_tokens = axis == len(rewrite.sizes.axes(node) or ()) - 2 and _sequence_axis(rewrite, key) == axis
    if not of_tokens or (given.get("is_causal") and place != _LAST) or query in (key, given["value"]):
        return None
    edges: _Edges = {query: axis}
    if isinstance(mask, Node):
        places = _places(rewrite, mask)
        if places is None:
            return None
        if len(places) > 1 and places[-2]:
            edges[mask] = len(places) - 2
    return edges


def _see_all(node: Node) -> None:
    """The last token's query alone sees every key."""
    if "is_causal" in node.kwargs:
        node.update_kwarg("is_causal", False)
    else:
        node.args = (*node.args[:-1], False)  # no positional argument comes after it


def _moving_edges(rewrite: Rewrite, node: Node, axis: int) -> _Edges | None:
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


def _sequence_axis(rewrite: Rewrite, node: Node) -> int | None:
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
