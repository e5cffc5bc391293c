"""What is computed for tokens that nothing reads is left out: of the outputs backwards, which tokens each value needs.

A head that reads single tokens needs these of the last block, but for keys and values. A layer whose keys and values
are those of an earlier layer needs them of no other token either, and so on, up to the last layer with keys of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.edges import SIZED, SPLITS, Edges, Slots, edges_of, sequence_axis
from prunepass.passes.propagation import result_faults
from prunepass.passes.reads import place_of, reads_by_place
from prunepass.passes.state import Rewrite

__all__ = ["HoistReads"]

aten = torch.ops.aten


@dataclass(frozen=True)
class HoistReads(Pass):
    """``f(x)[:, i]`` -> ``f(x[:, i : i + 1])``, from the reads of the head up to where other tokens are needed.

    After its attention a token's way is its own, and so are its queries: with a [CLS] head the last block needs keys
    and values of all tokens, and everything else of one. Where keys and values are returned as a cache, the same holds
    of the last layer that has its own, and of all that follow. The values read stay what they were. Nothing is done
    where the reads differ, or where an operator is not known to commute with them: the slice then stands below it.

    Attributes:
        fewer_queries: whether attention may have fewer queries than keys.
        attentions: of a graph without stages, how many attentions must get fewer queries for anything to be done.
    """

    fewer_queries: bool = True
    attentions: int = 2
    name = "hoist"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.mode != "gather":
            yield Fault(f"Reads move up where tokens are gathered, and the mode is {state.mode!r}.", state.stream_end)

    def run(self, state: Rewrite) -> int:
        """Returns the number of nodes that work on fewer tokens now."""
        state.graph.eliminate_dead_code()  # a pooler that nobody reads reads, too
        place, reads, thinned = self._found(state)
        if place is None or not thinned:
            return 0
        self._rewrite(state, place, thinned, reads)
        return len(thinned)

    def _found(self, state: Rewrite) -> tuple[Slots | None, list[Node], dict[Node, Edges]]:
        """Where tokens are read, by which nodes, and what works on those tokens alone."""
        if state.sites:
            reads = [n for n in state.graph.nodes if n.name in state.protected_reads]
            places = {place_of(n) for n in reads}
            place = places.pop() if len(places) == 1 else None
            if not state.reads_protected or place is None:
                return None, [], {}
            return place, reads, self._thinned(state, place, reads)
        found = [(p, reads, self._thinned(state, p, reads)) for p, reads in reads_by_place(state).items()]
        enough = [one for one in found if sum(n.target is SDPA for n in one[2]) >= self.attentions]
        if not enough:
            return None, [], {}
        best = max(enough, key=lambda one: len(one[2]))
        state.protected_reads = frozenset(read.name for read in best[1])
        return best

    def _thinned(self, state: Rewrite, place: Slots, reads: list[Node]) -> dict[Node, Edges]:
        """The nodes of which only the tokens at ``place`` are needed, with what they need of their arguments."""
        thinned: dict[Node, Edges] = {}
        for node in reversed(state.graph.nodes):
            if node not in reads and self._may(node) and _is_thinned(state, node, thinned, reads):
                edges = edges_of(state, node, place)
                if edges is not None:
                    thinned[node] = edges
        for node in [n for n in thinned if n.target is operator.getitem and n.args[0] not in thinned]:
            del thinned[node]  # another piece is needed whole: this one is sliced by those that read it
        return thinned

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
            if node.target in SIZED:
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
        after = state.last_placeholder if source.op == "placeholder" else source
        with state.graph.inserting_after(after):
            made = state.graph.call_function(aten.slice.Tensor, (source, axis, place.start, place.end))
        made.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
        stage = state.sites[-1].index if state.sites else None
        made.meta["prunepass"] = {"stage": stage, "pass": self.name}
        return made


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
