"""Scores beside the caches: what a stage chose its tokens by leaves the graph with them, for a later cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.passes.contract import Fault, Pass, is_ours
from prunepass.passes.state import Rewrite, Site

__all__ = ["ReturnScores", "Returned"]


@dataclass
class Returned:
    """Where in a graph's results the caches of pruned layers are.

    Attributes:
        results: how many results the graph had; what is added stands behind them.
        caches: by stage, the places of its keys and values among the results.
        padded: whether marks of filled slots are among what is added.
    """

    results: int = 0
    caches: list[list[int]] = field(default_factory=list)
    padded: bool = False


@dataclass(frozen=True)
class ReturnScores(Pass):
    """``(logits, k[kept], ...)`` -> ``(logits, k[kept], ..., rank, score[kept], protected[kept], ...)``: for each stage
    that prunes, what a later cut of its caches goes by. Runs after the pass ``cached``.

    Added are [B, S] int64, places among the row's live tokens; and for each stage [B, K] floating scores, [B, K] int64
    protection, 0 for none, [B, K] int64 positions in the row, and, where there is padding, [B, K] bool filled slots.

    Attributes:
        found: filled in by the pass.
    """

    found: Returned
    name = "scores"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for site in state.sites if state.cached else ():
            if site.scores is None or site.kept is None or site.kept.index is None:
                yield Fault(f"The stage {site.place} chose no tokens by scores.", site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns how many caches there are; where there is none, nothing is added."""
        if not state.cached:
            return 0
        assert state.live is not None
        self.found.results = len(state.results())
        self.found.padded = state.live.count is not None
        added: list[Node] = [state.live.rank]
        for level, site in enumerate(state.sites, 1):
            places = [i for i, n in enumerate(state.outputs) if n in state.cached and state.level[n] == level]
            self.found.caches.append(places)
            added += self._of_stage(state, site)
        given = state.output.args[0]
        assert isinstance(given, (tuple, list))
        state.output.args = ((*given, *added),)
        return sum(map(len, self.found.caches))

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        each = 4 if self.found.padded else 3
        wanted = self.found.results + (1 + each * len(state.sites) if state.cached else 0)
        if state.cached and len(state.results()) != wanted:
            yield Fault(f"The graph has {len(state.results())} results in place of {wanted}.", state.output)

    def _of_stage(self, state: Rewrite, site: Site) -> list[Node]:
        kept, live = site.kept, state.live
        assert kept is not None
        assert live is not None
        assert kept.index is not None
        assert kept.positions is not None
        assert site.scores is not None
        before = state.kept_before(site)
        operands = [
            state.operand(site.scores, "B", "S" if before is None else "T", dtype=state.score_dtype(site)),
            state.operand(kept.index, "B", "K", dtype=torch.int64),
        ]

        def build(scores: Tensor, index: Tensor) -> Tensor:
            return scores.gather(1, index)

        with state.graph.inserting_before(state.output):
            scores = state.inline(build, operands, stage=site.index, role=self.name, key=(self.name, before is None))
        protected = state.at_slots(live.protected, kept)
        assert protected is not None
        assert is_ours(scores)
        marks = [kept.alive] if kept.alive is not None else []
        return [scores, protected, kept.positions, *marks]
