"""Schedules worth trying: the best ones under an additive model of the loss, and the neighbours of a given one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch

from prunepass.cost.plans import PlanCosts
from prunepass.plan import Stage
from prunepass.training.methods.landscape import LossTable, best_schedules
from prunepass.training.methods.schedules import fit, geometric

__all__ = ["Space", "Stages"]

Stages = tuple[Stage, ...]

#: levels of the dynamic programme between two neighbours of the grid
_LEVELS_BETWEEN = 3
#: a schedule that leaves more than this share of the budget unused is stretched to it
_SLACK = 0.01


@dataclass(frozen=True)
class Space:
    """The schedules of a search.

    Attributes:
        prices: what they cost.
        table: what they are expected to lose.
        share: the budget, as a share of the dense cost.
        places: ascending, the blocks that stages may stand before.
        lowest: no keep goes below it.
    """

    prices: PlanCosts
    table: LossTable
    share: float
    places: tuple[int, ...]
    lowest: Fraction

    def fitted(self, stages: Sequence[Stage], fixed: int | None = None) -> Stages | None:
        """The stages, made to cost just the budget; ``fixed`` is the layer of one whose keep should stay, if it can."""
        found = fit(self.prices, stages, self.share, lowest=float(self.lowest), fixed=fixed)
        if found is None or fixed is None or self.prices.share(found) >= (1 - _SLACK) * self.share:
            return found
        return fit(self.prices, found, self.share, lowest=float(self.lowest))

    # -- from nothing ------------------------------------------------------------------------------------------------

    def candidates(self, count: int) -> list[Stages]:
        """The best schedules of the additive model, a geometric one, and a single early stage (which always fits)."""
        levels = self._levels()
        planned = [self._stages(levels, chosen) for _, chosen in self._planned(levels)[:count]]
        falling = geometric(self.places, 0.9)
        single = geometric(self.places[:1], 0.5)
        fitted = (self.fitted(stages) for stages in (*planned, falling, single) if stages)
        return list(dict.fromkeys(stages for stages in fitted if stages is not None))

    def _levels(self) -> list[Fraction]:
        """All keeps that the dynamic programme may choose, falling from 1: those tried, the lowest, some between."""
        tried = [Fraction(round(1000 * keep), 1000) for keep in self.table.keeps]
        grid = [Fraction(1), *(keep for keep in tried if keep > self.lowest), self.lowest]
        levels = [Fraction(1)]
        for high, low in pairwise(grid):
            ratio = float(low / high) ** (1 / (_LEVELS_BETWEEN + 1))
            levels += [Fraction(round(1000 * float(high) * ratio**i), 1000) for i in range(1, _LEVELS_BETWEEN + 1)]
            levels.append(low)
        return sorted(set(levels), reverse=True)

    def _planned(self, levels: Sequence[Fraction]) -> list[tuple[float, tuple[int, ...]]]:
        ends = (*self.places[1:], self.table.num_blocks)
        stretches = list(zip(self.places, ends, strict=True))
        scoring = [self.prices.stage(keep) for keep in levels]
        losses = [[self.table.at(a, float(r)) - self.table.at(b, float(r)) for r in levels] for a, b in stretches]
        running = [[self.prices.blocks(a, b, keep) for keep in levels] for a, b in stretches]
        costs = torch.tensor(running, dtype=torch.float64)[:, None, :].repeat(1, len(levels), 1)
        costs += torch.tensor(scoring, dtype=torch.float64)[None, :, None] * (1 - torch.eye(len(levels)))
        ahead = self.prices.rest() + self.prices.blocks(0, self.places[0], Fraction(1))
        budget = self.share * self.prices.dense - ahead
        return best_schedules(torch.tensor(losses, dtype=torch.float64), costs, budget)

    def _stages(self, levels: Sequence[Fraction], chosen: Sequence[int]) -> list[Stage]:
        """Stages where the level changes."""
        steps = zip(self.places, (0, *chosen), chosen, strict=False)
        return [Stage(layer, levels[after]) for layer, before, after in steps if after != before]

    # -- from a schedule -----------------------------------------------------------------------------------------------

    def neighbours(self, stages: Stages, factor: float) -> list[tuple[str, Stages]]:
        """What one change makes of a schedule, fitted to the budget; those of the least predicted loss first.

        Args:
            factor: above 1; by how much one keep rises or falls.

        Returns:
            (kind of change, stages) of each.
        """
        found: dict[Stages, str] = {}
        for step, changed, fixed in self._changes(stages, factor):
            fitted = self.fitted(changed, fixed)
            if fitted is not None and fitted != stages:
                found.setdefault(fitted, step)
        order = sorted(found, key=lambda s: (self.table.predict(s), [(x.layer, x.keep) for x in s]))
        return [(found[s], s) for s in order]

    def _changes(self, stages: Stages, factor: float) -> Iterator[tuple[str, list[Stage], int | None]]:
        taken = {stage.layer for stage in stages}
        for i, stage in enumerate(stages):
            others = [*stages[:i], *stages[i + 1 :]]
            if others:
                yield "left out", others, None
                for step, keep in (("raised", float(stage.keep) * factor), ("lowered", float(stage.keep) / factor)):
                    yield step, [*stages[:i], replace(stage, keep=self._bounded(keep)), *stages[i + 1 :]], stage.layer
            for layer in self._beside(stage.layer):
                if layer not in taken:
                    yield "moved", sorted([*others, replace(stage, layer=layer)], key=lambda s: s.layer), None
        for layer in self.places:
            if layer not in taken:
                yield "put in", self._with(stages, layer), None

    def _beside(self, layer: int) -> list[int]:
        i = self.places.index(layer)
        return [self.places[j] for j in (i - 1, i + 1) if 0 <= j < len(self.places)]

    def _with(self, stages: Stages, layer: int) -> list[Stage]:
        """A stage more, half-way (in ratio) between its neighbours."""
        before = [s for s in stages if s.layer < layer]
        after = [s for s in stages if s.layer > layer]
        high = before[-1].keep if before else Fraction(1)
        low = after[0].keep if after else max(self.lowest, high / 2)
        return [*before, Stage(layer, self._bounded(math.sqrt(high * low))), *after]

    def _bounded(self, keep: float) -> Fraction:
        return min(Fraction(999, 1000), max(self.lowest, Fraction(round(1000 * keep), 1000)))
