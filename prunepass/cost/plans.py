"""What a plan costs over rows of real lengths, by any `CostModel`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunepass.cost.model import CostModel
from prunepass.errors import OptionError, PlanError
from prunepass.plan import Protect, PrunePlan, Stage, kept_count
from prunepass.plan.annotations import Leave

__all__ = ["PlanCosts", "plan_cost", "plan_share"]

_ALL = Fraction(1)


@dataclass(frozen=True)
class PlanCosts:
    """Costs of plans over one corpus: every row alone at its own length, no padding.

    Attributes:
        costs: of the model's parts.
        lengths: [U] int64, the distinct lengths of the corpus.
        weights: [U] float64, the share of the rows that each of them has.
        protect: the tokens that all plans keep.
        leave: how tokens leave at stages that drop as they are written: "merge" in a search for stages that merge.
    """

    costs: CostModel
    lengths: Tensor
    weights: Tensor
    protect: Protect
    leave: Leave = "drop"
    _known: dict[Any, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def over(
        cls, costs: CostModel, lengths: Sequence[int], protect: Protect | None = None, leave: Leave = "drop"
    ) -> PlanCosts:
        """For rows of ``lengths`` live tokens. Raises `OptionError` where there are none, or one is below 1."""
        if not len(lengths):
            raise OptionError("The list of lengths is empty; give the number of live tokens of each row.")
        if min(lengths) < 1:
            raise OptionError(f"Every length must be at least 1; found {min(lengths)}.")
        rows = sorted(Counter(int(n) for n in lengths).items())
        distinct, counts = (torch.tensor(column) for column in zip(*rows, strict=True))
        return cls(costs, distinct, counts.double() / counts.sum(), protect or Protect(), leave)

    @cached_property
    def dense(self) -> float:
        """Mean cost of a row, unpruned."""
        return self.cost(())

    def share(self, stages: Sequence[Stage]) -> float:
        """Cost of the stages, as a share of the dense cost."""
        return self.cost(stages) / self.dense

    def cost(self, stages: Sequence[Stage]) -> float:
        """Mean cost of a row, in the unit of ``costs``: blocks at the tokens they get, scoring, and all else.

        Raises:
            PlanError: a stage stands after an attention, or at a block that the model does not have.
        """
        last = self.costs.num_blocks
        total, keep, start = self.rest(), _ALL, 0
        for stage in stages:
            self._check(stage)
            if stage.keep == 1:
                continue  # nothing is scored or selected there
            total += self.blocks(start, stage.layer, keep) + self.stage(keep)
            if "merge" in (self.leave, stage.leave):
                total += self.merging(keep, stage.keep)
            keep, start = stage.keep, stage.layer
        return total + self.blocks(start, last, keep)

    def rest(self) -> float:
        """Mean cost of a row outside the blocks."""
        return self._mean(("rest",), _ALL, self.costs.rest)

    def stage(self, keep: Fraction) -> float:
        """Mean cost of a stage that ``keep`` of the tokens reach."""
        return self._mean(("stage", keep), keep, self.costs.stage)

    def merging(self, before: Fraction, after: Fraction) -> float:
        """Mean cost of averaging the tokens that leave into those that stay, where the cost model counts it."""
        pair = getattr(self.costs, "pair", 0.0)
        key = ("merge", before, after)
        if key not in self._known:
            self._known[key] = pair * float(self.weights @ (self._counts(before) * self._counts(after)))
        return self._known[key]

    def blocks(self, first: int, end: int, keep: Fraction) -> float:
        """Mean cost of blocks ``first`` to ``end - 1`` on ``keep`` of the tokens."""
        return sum(
            self._mean((block, keep), keep, lambda n, block=block: self.costs.at(block, n))
            for block in range(first, end)
        )

    def _mean(self, key: Any, keep: Fraction, cost: Any) -> float:
        if key not in self._known:
            self._known[key] = float(self.weights @ cost(self._counts(keep)))
        return self._known[key]

    def _counts(self, keep: Fraction) -> Tensor:
        counts: Tensor = kept_count(self.lengths, keep, self.protect, minimum=_minimum, maximum=_maximum)
        return counts.double()

    def _check(self, stage: Stage) -> None:
        if stage.after_attention:
            raise PlanError(
                f"The stage {stage.place} cannot be costed: costs are those of whole blocks. Place it before a block."
            )
        if stage.layer >= self.costs.num_blocks:
            raise PlanError(
                f"The plan has a stage {stage.place}, but the costs are those of a model with {self.costs.num_blocks} "
                "blocks, numbered from 0."
            )


def plan_cost(costs: CostModel, plan: PrunePlan, lengths: Sequence[int]) -> float:
    """Mean cost of a row under ``plan``, scoring included, in the unit of ``costs``.

    Args:
        lengths: live tokens of each row; every row is taken alone, without padding.

    Raises:
        OptionError: no lengths.
        PlanError: a stage after an attention, or beyond the model's blocks.
    """
    return PlanCosts.over(costs, lengths, plan.protect).cost(plan.stages)


def plan_share(costs: CostModel, plan: PrunePlan, lengths: Sequence[int]) -> float:
    """`plan_cost` as a share of the dense cost: the total over all rows, pruned / dense."""
    return PlanCosts.over(costs, lengths, plan.protect).share(plan.stages)


def _maximum(a: Any, b: Any) -> Any:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _minimum(a: Any, b: Any) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
