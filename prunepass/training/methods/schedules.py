"""Stages that meet a budget: what a budget is, and how keeps are fitted to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.errors import OptionError
from prunepass.plan import Protect, Stage
from prunepass.plan.annotations import Leave

__all__ = ["Budget", "fit", "geometric", "shortfall", "spread"]

#: fitted keeps are held to thousandths
_STEPS = 1000
_HIGHEST = 1 - 1 / _STEPS
_BISECTIONS = 30
#: a stage that leaves more than this share of what reaches it is not worth its scoring
_USEFUL = 0.98


@dataclass(frozen=True)
class Budget:
    """What a pruned row may cost on average: a share of the dense cost, or an amount in the cost model's own unit.

    Args:
        share: in (0, 1).
        cost: in FLOPs or seconds, as the cost model has it.

    Raises:
        OptionError: neither or both are given, or one is outside its range.
    """

    share: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.cost is None):
            raise OptionError("A budget is either a share of the dense cost or a cost; give one of them.")
        if self.share is not None and not 0 < self.share < 1:
            raise OptionError(f"A budget as a share of the dense cost must lie between 0 and 1, not {self.share!r}.")
        if self.cost is not None and not (self.cost > 0 and math.isfinite(self.cost)):
            raise OptionError(f"A budget as a cost must be positive, not {self.cost!r}.")

    @classmethod
    def of(cls, value: Budget | float) -> Budget:
        """Of a number, which means a share; a `Budget` stays what it is."""
        return value if isinstance(value, Budget) else cls(share=value)

    def as_share(self, prices: PlanCosts) -> float:
        """As a share of the dense cost; 1 or more where the dense model meets it."""
        if self.share is not None:
            return self.share
        assert self.cost is not None
        return self.cost / prices.dense


def spread(
    budget: Budget | float,
    costs: CostModel,
    *,
    lengths: Sequence[int],
    layers: Sequence[int] | None = None,
    protect: Protect | None = None,
    leave: Leave = "drop",
) -> tuple[Stage, ...]:
    """A fixed schedule that meets a budget: the s-th stage keeps r^s, with r as large as the budget allows.

    This is the geometric schedule of SDTP (and of the short form ``{"keep": r, "layers": [...]}``): what a scorer gets
    where no search or training places its stages.

    Args:
        budget: mean cost of a row; a number is a share of the dense cost.
        lengths: live tokens of the rows that the mean is over.
        layers: blocks that stages stand before, ascending; all but the first block if not given.
        protect: of the plan; the first token if not given.
        leave: how tokens leave at all stages.

    Raises:
        OptionError: the budget cannot be met with stages at these layers; the message says what can.
    """
    prices = PlanCosts.over(costs, lengths, protect, leave)
    places = list(range(1, costs.num_blocks)) if layers is None else sorted(set(layers))
    if not places:
        raise OptionError("There is no layer to place a stage at; give layers, or a model of at least 2 blocks.")
    share = Budget.of(budget).as_share(prices)
    if share >= 1:
        return ()
    fitted = _bisect(prices, share, lambda t: geometric(places, math.exp(-t)))
    if fitted is None:
        raise shortfall(share, prices, geometric(places, 0.0))
    return tuple(replace(stage, leave=leave) for stage in fitted)


def geometric(layers: Sequence[int], ratio: float, *, lowest: float = 1 / _STEPS) -> tuple[Stage, ...]:
    """Stages before ``layers``, the s-th of which (from 1) keeps ``ratio`` to the power s, at least ``lowest``."""
    return tuple(Stage(layer, _thousandths(max(lowest, ratio**s))) for s, layer in enumerate(layers, 1))


def fit(
    prices: PlanCosts, stages: Sequence[Stage], share: float, *, lowest: float, fixed: int | None = None
) -> tuple[Stage, ...] | None:
    """The stages with every keep raised to one common power, such that they cost just ``share`` of the dense model.

    Stages that come to drop next to nothing are left out, and the others fitted again.

    Args:
        lowest: no keep goes below it.
        fixed: layer of a stage whose keep stays; the others stay on their side of it.

    Returns:
        None where the budget cannot be met so.
    """
    fitted = _bisect(prices, share, lambda t: _scaled(stages, t, lowest, fixed))
    if fitted is None:
        return None
    useful = _useful(fitted, fixed)
    if len(useful) == len(fitted):
        return fitted
    return fit(prices, useful, share, lowest=lowest, fixed=fixed) if useful else None


def _bisect(prices: PlanCosts, share: float, at: Callable[[float], tuple[Stage, ...]]) -> tuple[Stage, ...] | None:
    """``at(t)`` of the smallest power that meets the budget; the cost falls as t grows."""
    low, high = 0.0, math.log(1 / _STEPS) / math.log(_HIGHEST)  # even the largest keep is at its lowest there
    if prices.share(at(high)) > share:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if prices.share(at(middle)) <= share else (middle, high)
    return at(high)


def _scaled(stages: Sequence[Stage], power: float, lowest: float, fixed: int | None = None) -> tuple[Stage, ...]:
    pivot = next((s.keep for s in stages if s.layer == fixed), None)

    def keep_of(stage: Stage) -> Fraction:
        if stage.layer == fixed:
            return stage.keep
        keep = _thousandths(max(lowest, min(_HIGHEST, float(stage.keep)) ** power))
        if pivot is None or fixed is None:
            return keep
        return max(keep, pivot) if stage.layer < fixed else min(keep, pivot)

    return tuple(replace(stage, keep=keep_of(stage)) for stage in stages)


def _thousandths(keep: float) -> Fraction:
    return Fraction(round(_STEPS * min(keep, _HIGHEST)), _STEPS)


def _useful(stages: Sequence[Stage], fixed: int | None) -> list[Stage]:
    """Without the stages that hardly differ from what reaches them."""
    kept: list[Stage] = []
    for stage in stages:
        before = kept[-1].keep if kept else Fraction(1)
        if stage.layer == fixed or stage.keep < _USEFUL * before:
            kept.append(stage)
    return kept


def shortfall(share: float, prices: PlanCosts, cheapest: Sequence[Stage]) -> OptionError:
    """The error for a budget that even the ``cheapest`` stages exceed."""
    lowest = prices.share(cheapest)
    first = cheapest[0]
    earlier = ", or place stages earlier (before block 0, with a scorer that reads no attention)" if first.layer else ""
    return OptionError(
        f"The budget of {share:.1%} of the dense cost ({_amount(share * prices.dense, prices)} a row) cannot be met: "
        f"with the first stage {first.place}, the lowest is {lowest:.1%} ({_amount(lowest * prices.dense, prices)}). "
        f"Raise the budget{earlier}."
    )


def _amount(cost: float, prices: PlanCosts) -> str:
    """A cost in its unit; a cost model need not name one."""
    unit = getattr(prices.costs, "unit", "")
    if unit == "s":
        return f"{1000 * cost:.3g} ms"
    return f"{cost:.3g} {unit}".strip()
