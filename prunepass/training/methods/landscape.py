"""What a search expects of schedules it has not tried: an additive model of the loss, and its best schedules."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunepass.plan import Stage

__all__ = ["LossTable", "best_schedules"]

_BINS = 4000


@dataclass(frozen=True)
class LossTable:
    """Losses of single cuts, ``F(l, r)``: the model with share r of the tokens left from block l on.

    A schedule's loss is predicted as a sum over its blocks, ``dense + sum_l F(l, r_l) - F(l + 1, r_l)``: what it costs
    that block l runs on r_l of the tokens if all that follow do so too. Within a stretch of equal keeps the sum
    telescopes, so a single cut is predicted exactly.

    Attributes:
        layers: ascending, the blocks that single cuts were made before.
        keeps: falling, the shares that were tried there.
        losses: for each layer, those of each keep.
        dense: the unpruned model's.
        num_blocks: a cut before block ``num_blocks`` would change nothing.
    """

    layers: tuple[int, ...]
    keeps: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    dense: float
    num_blocks: int

    def at(self, layer: int, keep: float) -> float:
        """F at any place, linear between those measured, and below the lowest keep as between the lowest two points."""
        columns = (*self.layers, self.num_blocks)
        rows = [self._row(i, keep) for i in range(len(self.layers))] + [self.dense]
        return _between(columns, rows, layer)

    def predict(self, stages: Sequence[Stage]) -> float:
        """Loss of a schedule."""
        ends = [*(stage.layer for stage in stages), self.num_blocks][1:]
        cuts = ((stage.layer, end, float(stage.keep)) for stage, end in zip(stages, ends, strict=True))
        return self.dense + sum(self.at(start, keep) - self.at(end, keep) for start, end, keep in cuts)

    def _row(self, index: int, keep: float) -> float:
        shares = (*reversed(self.keeps), 1.0)
        losses = (*reversed(self.losses[index]), self.dense)
        if keep < shares[0]:
            slope = (losses[1] - losses[0]) / (shares[1] - shares[0])
            return losses[0] - slope * (shares[0] - keep)
        return _between(shares, losses, keep)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"layers": self.layers, "keeps": self.keeps, "losses": self.losses, "dense": self.dense}


def _between(points: Sequence[float], values: Sequence[float], x: float) -> float:
    """Linear between ascending points, flat outside."""
    if x <= points[0]:
        return values[0]
    if x >= points[-1]:
        return values[-1]
    i = bisect_right(points, x)
    part = (x - points[i - 1]) / (points[i] - points[i - 1])
    return values[i - 1] + part * (values[i] - values[i - 1])


def best_schedules(
    losses: Tensor, costs: Tensor, budget: float, *, bins: int = _BINS
) -> list[tuple[float, tuple[int, ...]]]:
    """The schedules of least summed loss within a budget, by dynamic programming over the cost spent.

    A schedule gives each of K stretches of the model one of R levels; levels are in the order of falling keep, level 0
    keeps all, and the level never falls back along the model.

    Args:
        losses: [K, R] float64, what stretch k adds to the loss at level j.
        costs: [K, R, R] float64, what stretch k costs at level j (last axis) when level i comes before it.
        budget: bound of the summed cost.
        bins: the budget is divided into so many. Costs are rounded up to whole bins, so what is found is within the
            budget. It is the optimum where costs are whole bins; else the optimum of a budget at most K bins smaller.

    Returns:
        (loss, levels) of the best schedule for each last level that can be reached, the best first.
    """
    weights = torch.ceil(costs / budget * bins - 1e-6).clamp(min=0).long()
    spent = torch.full((losses.shape[1], bins + 1), math.inf, dtype=losses.dtype)  # [level, bins spent] -> least loss
    spent[0, 0] = 0
    came_from = []
    for gains, steps in zip(losses.tolist(), weights.tolist(), strict=True):
        spent, origin = _advance(spent, gains, steps)
        came_from.append(origin)
    found = []
    for level, (loss, at) in enumerate(zip(*(t.tolist() for t in spent.min(dim=1)), strict=True)):
        if math.isfinite(loss):
            found.append((loss, _trace(came_from, weights, level, at)))
    return sorted(found)


def _advance(spent: Tensor, gains: list[float], steps: list[list[int]]) -> tuple[Tensor, Tensor]:
    """One stretch on: the least losses after it, and the level before it of each."""
    levels, width = spent.shape
    after, origin = torch.full_like(spent, math.inf), torch.zeros(levels, width, dtype=torch.long)
    for j in range(levels):
        for i in range(j + 1):
            step = steps[i][j]
            if step >= width:
                continue
            reached = spent[i, : width - step] + gains[j]
            better = reached < after[j, step:]
            after[j, step:] = torch.where(better, reached, after[j, step:])
            origin[j, step:].masked_fill_(better, i)
    return after, origin


def _trace(came_from: Sequence[Tensor], weights: Tensor, level: int, at: int) -> tuple[int, ...]:
    levels = []
    for origin, steps in zip(reversed(came_from), reversed(weights.unbind()), strict=True):
        levels.append(level)
        before = int(origin[level, at])
        at -= int(steps[before, level])
        level = before
    return tuple(reversed(levels))
