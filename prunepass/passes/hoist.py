"""A head that reads single tokens: what the last block computes for the others is left out."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.edges import RESHAPES, SPLITS, TO_THE_END, Edges, Slots, edges_of, sequence_axis
from prunepass.passes.propagation import result_faults
from prunepass.passes.state import Rewrite

__all__ = ["HoistReads"]

aten = torch.ops.aten


@dataclass(frozen=True)
class HoistReads(Pass):
    """``f(x)[:, i]`` -> ``f(x[:, i : i + 1])``, from the reads of the head up through the last block.

    After its attention a token's way is its own, and so are its queries: with a [CLS] head the last block needs keys
    and values of all tokens, and everything else of one. The values read stay what they were. Nothing is done where
    the reads differ, or where an operator is not known to commute with them: the slice then stands below it.
    """

    #: whether attention may have fewer queries than keys
    fewer_queries: bool = True
    name = "hoist"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.mode != "gather":
            yield Fault(f"Reads move up where tokens are gathered, and the mode is {state.mode!r}.", state.stream_end)

    def run(self, state: Rewrite) -> int:
        """Returns the number of nodes that work on fewer tokens now."""
        state.graph.eliminate_dead_code()  # a pooler that nobody reads reads, too
        reads = [n for n in state.graph.nodes if n.name in state.protected_reads]
        places = {_place(n) for n in reads}
        place = places.pop() if len(places) == 1 else None
        if not state.reads_protected or place is None:
            return 0
        thinned: dict[Node, Edges] = {}
        for node in reversed(state.graph.nodes):
            if node not in reads and self._may(node) and _is_thinned(state, node, thinned, reads):
                edges = edges_of(state, node, place)
                if edges is not None:
                    thinned[node] = edges
        for node in [n for n in thinned if n.target is operator.getitem and n.args[0] not in thinned]:
            del thinned[node]  # another piece is needed whole: this one is sliced by those that read it
        if not thinned:
            return 0
        self._rewrite(state, place, thinned, reads)
        return len(thinned)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for node in state.thinned:
            for user in node.users:
                if user not in state.thinned and user.name not in state.protected_reads:
                    yield Fault(f"It reads {node.name}, which holds the head's tokens only, and may need others.", user)
            if node.target is SDPA and attention_arguments(node).get("is_causal"):
                yield Fault("Its mask counts rows from the first token, and it holds the head's tokens only.", node)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return result_faults(state)

    def _may(self, node: Node) -> bool:
        return self.fewer_queries or node.target is not SDPA

    def _rewrite(self, state: Rewrite, place: Slots, thinned: dict[Node, Edges], reads: list[Node]) -> None:
        slices: dict[tuple[Node, int], Node] = {}
        for node, edges in thinned.items():
            for source, axis in edges.items():
                if source not in thinned:
                    if (source, axis) not in slices:
                        slices[source, axis] = self._slice(state, node, source, axis, place)
                    node.replace_input_with(source, slices[source, axis])
            if node.target in RESHAPES:
                shape: Any = node.args[1]
                at = sequence_axis(state, node)
                assert at is not None
                node.args = (node.args[0], [*shape[:at], place.count, *shape[at + 1 :]])
            if node.target is SDPA and attention_arguments(node).get("is_causal"):
                _see_all(node)
            state.level[node] = 0  # the length of its level is not its length any more
            state.thinned[node] = place.count
        for read in reads:
            if read.args[0] in thinned:
                first = 0 if read.target is aten.select.int else None
                rest = () if first == 0 else (None,)
                read.args = (read.args[0], read.args[1], first, *rest)

    def _slice(self, state: Rewrite, before: Node, source: Node, axis: int, place: Slots) -> Node:
        with state.graph.inserting_after(source):
            made = state.graph.call_function(aten.slice.Tensor, (source, axis, place.start, place.end))
        made.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
        made.meta["prunepass"] = {"stage": state.sites[-1].index, "pass": self.name}
        return made


def _place(read: Node) -> Slots | None:
    """Where a read that `passes.reads` noted takes its tokens from."""
    start: Any = read.args[2] if len(read.args) > 2 else 0
    start = 0 if start is None else start
    if read.target is aten.select.int:
        return Slots(start, start + 1 if start != -1 else TO_THE_END, 1)
    end: Any = read.args[3] if len(read.args) > 3 else None
    if start < 0:
        return Slots(start, TO_THE_END, -start)
    return Slots(start, end, end - start) if isinstance(end, int) else None


def _is_thinned(rewrite: Rewrite, node: Node, thinned: dict[Node, Edges], reads: list[Node]) -> bool:
    """Whether all users ask for the read tokens of ``node`` only, along the axis that its tokens lie on."""
    users = list(node.users)
    whole = node.args[0] if node.target in SPLITS else node
    axis = sequence_axis(rewrite, whole) if isinstance(whole, Node) else None
    return bool(users) and all(u in reads or (u in thinned and thinned[u].get(node) == axis) for u in users)


def _see_all(node: Node) -> None:
    """The last token's query alone sees every key."""
    if "is_causal" in node.kwargs:
        node.update_kwarg("is_causal", False)
    else:
        node.args = (*node.args[:-1], False)  # no positional argument comes after it
