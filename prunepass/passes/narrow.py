"""Gathering everything that crosses a cut to the kept tokens.

``f(h, side)`` -> ``f(h[kept], side[kept])``, for each consumer f below the cut. The hidden state is gathered once;
what else the consumers read is the job of `passes.side`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node, map_arg

from prunepass.graph.ops import is_pointwise
from prunepass.graph.trace import Operand
from prunepass.passes.contract import Fault, SitePass, is_ours
from prunepass.passes.merge import insert_merge, merges
from prunepass.passes.propagation import size_faults
from prunepass.passes.samples import merge_faults
from prunepass.passes.side import ROLE, Memo, Visit, index_of
from prunepass.passes.state import Rewrite, latest
from prunepass.passes.take import take

__all__ = ["Narrow"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Narrow(SitePass):
    """Below the cut nothing depends on the full length any more, but for what reads a count of tokens as a number."""

    name = ROLE

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        kept = self.site.kept
        if state.mode != "gather" or kept is None or kept.index is None or kept.positions is None:
            yield Fault(f"There are no indices of kept tokens to gather by in mode {state.mode!r}.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns the number of consumers changed. Raises `RefusalError` for a value that cannot be gathered."""
        level = self._level(state)
        self.site.narrowed = self._hidden(state)
        memo, count = Memo(), 1
        for node in list(state.graph.nodes):
            if state.level.get(node) != level:
                continue
            visit = Visit(memo, state, self.site, level, node)
            args, kwargs = map_arg(node.args, visit.argument), map_arg(node.kwargs, visit.argument)
            if visit.changed:
                node.args, node.kwargs = args, kwargs
                count += 1
        return count

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        level = self._level(state)
        if self.site.narrowed is None:
            yield Fault("The hidden state was not gathered.", self.site.cut)
        for node in state.graph.nodes:
            if state.level.get(node) != level:
                continue
            for a in node.all_input_nodes:
                if not self._holds(state, node, a, level):
                    what = "the hidden state of all tokens" if a is self.site.cut else "the full length"
                    yield Fault(f"It still depends on {what}, which it reads as {a.name}.", node)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        yield from size_faults(state, self._level(state))
        if self.site.merged is not None:
            yield from merge_faults(state, self.site)

    def _holds(self, state: Rewrite, node: Node, a: Node, level: int) -> bool:
        """Whether what a consumer reads is as long as it may be below the cut."""
        if a is self.site.cut:
            return False
        if is_ours(a):
            return self.is_mine(a)
        if state.level.get(a, 0) == level or not state.sizes.follows_length(a):
            return True
        # an operand of arithmetic on elements, a scale by the length say, is a number that means the text's length
        return state.sizes.number(a) is not None and is_pointwise(node)

    def _level(self, state: Rewrite) -> int:
        return state.sites.index(self.site) + 1

    def _hidden(self, state: Rewrite) -> Node:
        site, index = self.site, index_of(self.site)
        if merges(state):
            return insert_merge(state, site, self.name)
        hidden, slots = state.value(site.cut), "S" if state.kept_before(site) is None else "T"
        operands = [
            Operand(site.cut, ("B", slots, *hidden.shape[2:]), hidden.dtype, state.device),
            state.operand(index, "B", "K", dtype=torch.int64),
        ]
        assert site.kept is not None
        with state.graph.inserting_after(latest(site.cut, index, site.kept.positions, site.kept.alive)):
            anchor = state.graph.create_node("call_function", aten.alias.default, (site.cut,))
        with state.graph.inserting_before(anchor):
            out = state.inline(
                lambda x, index: take(x, index, 1, 0), operands, stage=site.index, role=self.name, key=("take", 1, 0)
            )
        state.graph.erase_node(anchor)
        assert isinstance(out, Node)
        return out
