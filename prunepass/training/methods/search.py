"""Where to place stages and how much to keep at each, found without training.

1. Single cuts: the loss with a share r left from block l on, for a coarse grid of l and r.
2. An additive model of those (`landscape.LossTable`) and exact dynamic programming over it: the few best schedules
   under the budget.
3. These are evaluated for real, beside a plain geometric schedule; the best, too, with more tokens protected at the
   start of each row, at the same cost: a beginning that stays whole is worth much to some models (titles, questions).
4. The best of all is improved by local moves: one keep up or down and the others fitted to the budget, a stage moved
   by a block, left out, or put in. The additive model says which to try first. Where none helps, the steps get finer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.errors import OptionError, PruneError, option
from prunepass.plan import PrunePlan, Stage, as_fraction
from prunepass.plan.annotations import Leave
from prunepass.scorers import scorer_class
from prunepass.training.methods.candidates import Space, Stages
from prunepass.training.methods.landscape import LossTable
from prunepass.training.methods.schedules import Budget, shortfall

__all__ = ["BEGINNINGS", "SearchResult", "Trial", "search"]

logger = logging.getLogger(__name__)

GRID = (0.75, 0.5, 0.3, 0.15, 0.05)
LOWEST = 0.01
#: numbers of tokens at the start of rows that are tried as protected
BEGINNINGS = (8, 16, 32, 64)
#: schedules of the additive model that are tried
_CANDIDATES = 4
#: neighbours of the best schedule that are tried before the steps get finer
_TRIED = 8
#: part of a budget that the cheapest plan past the embeddings must meet, for the search to keep off them
_EASILY = 0.75
#: a local move changes a keep by such factors, the coarse ones first
_FACTORS = (1.4, 1.2, 1.1, 1.05)
#: share of the loss above dense that a move, or a protected beginning, must win
_WORTH = 1e-3


@dataclass(frozen=True)
class Trial:
    """One plan that was evaluated. ``step`` says why: "dense", "single cut", "candidate", "beginning" (more tokens
    protected at the start of each row) or a local move; ``first`` how many tokens were protected there."""

    step: str
    stages: Stages
    loss: float
    share: float
    first: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; keeps as exact fractions."""
        return {
            "step": self.step,
            "stages": [s.to_dict() for s in self.stages],
            "loss": self.loss,
            "share": self.share,
            "first": self.first,
        }


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        plan: its stages, with the scorer and the protected tokens that were asked for, or more of them at the start.
        loss: measured, of the plan; ``dense_loss`` that of the unpruned model.
        predicted: what the additive model says of the stages; it knows nothing of protected beginnings.
        share: cost of the plan over that of the dense model; ``budget`` what was allowed.
        cost: of a row on average, in ``unit``.
        table: losses of single cuts; None where nothing had to be pruned.
        trials: every plan evaluated, in order.
    """

    plan: PrunePlan
    loss: float
    dense_loss: float
    predicted: float
    share: float
    budget: float
    cost: float
    unit: str
    table: LossTable | None
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        plain = {k: v for k, v in vars(self).items() if k not in ("plan", "table", "trials")}
        return {
            "plan": self.plan.to_dict(),
            **plain,
            "table": self.table.to_dict() if self.table else None,
            "trials": [t.to_dict() for t in self.trials],
        }


def search(
    evaluate: Callable[[PrunePlan], float],
    costs: CostModel,
    budget: Budget | float,
    *,
    lengths: Sequence[int],
    template: PrunePlan | None = None,
    layers: Sequence[int] | None = None,
    grid: Sequence[float] = GRID,
    lowest: float = LOWEST,
    max_evaluations: int = 80,
    beginnings: Sequence[int] = BEGINNINGS,
    on_step: Callable[[str], None] | None = None,
    leave: Leave = "drop",
    from_embeddings: bool | None = None,
) -> SearchResult:
    """The stages that meet a budget at the least loss, without training. Deterministic where ``evaluate`` is.

    Args:
        evaluate: loss of a plan on calibration data, smaller is better; such as the divergence of the pruned model's
            outputs from the dense model's. Called with plans of no stages, too.
        costs: FLOPs or seconds of the model's parts.
        budget: mean cost of a row; a number is a share of the dense cost.
        lengths: live tokens of the rows that the mean is over (those of the calibration data).
        template: gives all plans their scorer, protected tokens and way of restoring; its stages do not matter.
        layers: blocks that stages may stand before. By default all, but for the first where the scorer reads the
            attention of the block before. See ``from_embeddings`` for pairs.
        grid: keeps that single cuts are tried with.
        lowest: no keep goes below it.
        max_evaluations: bound of the calls of ``evaluate``. About half go into single cuts (in a deep model, at some of
            the layers), some into whole schedules and beginnings, the rest into local moves.
        beginnings: numbers of tokens at the start of each row that are tried as protected, where ``template`` protects
            fewer and none by id or segment; an empty list for its own protection alone.
        on_step: called with a word on what runs, before every evaluation.
        leave: how tokens leave at the stages of all plans.
        from_embeddings: whether stages may stand before the first block. Where not, it is left out, also of ``layers``,
            as long as the budget is easily met without. By default it is left out where ``template`` protects a segment
            (the question of a pair): the passage has not met the question yet.

    Returns:
        A `SearchResult` whose share is at most the budget. Where the dense model meets the budget, its plan is empty.

    Raises:
        OptionError: the budget cannot be met (the message says what can), or an argument is out of its range.
        PruneError: ``evaluate`` gave a loss that is not finite.
    """
    template = replace(template or PrunePlan(()), stages=(), weights={})
    prices = PlanCosts.over(costs, lengths, template.protect, leave)
    keeps, least = _checked_keeps(grid, lowest)
    places = _checked_layers(layers, template, costs.num_blocks)
    share = Budget.of(budget).as_share(prices)
    trials = _Trials(evaluate, template, prices, max_evaluations, on_step or (lambda _: None))
    dense = trials.run("dense", ())
    if share >= 1:
        return _result(dense, dense, None, share, trials)
    if from_embeddings is None:
        from_embeddings = template.protect.segment is None
    if not from_embeddings:
        places = _past_the_embeddings(places, prices, share, least)
    cheapest = [Stage(places[0], least)]
    if prices.share(cheapest) > share:
        raise shortfall(share, prices, cheapest)

    anchors = _anchors(places, len(keeps), max_evaluations)
    table = _single_cuts(trials, anchors, keeps, dense.loss)
    space = Space(prices, table, share, places, least)
    best = _improved(*_best_beginning(trials, space, _best_candidate(trials, space), beginnings))
    logger.debug("search: loss %.4g at share %.3f after %d evaluations", best.loss, best.share, len(trials.done))
    return _result(best, dense, table, share, trials)


def _result(best: Trial, dense: Trial, table: LossTable | None, budget: float, trials: _Trials) -> SearchResult:
    trials = trials.protecting(best.first)
    return SearchResult(
        plan=trials.plan(best.stages),
        loss=best.loss,
        dense_loss=dense.loss,
        predicted=table.predict(best.stages) if table else dense.loss,
        share=best.share,
        budget=budget,
        cost=trials.prices.cost(best.stages),
        unit=getattr(trials.prices.costs, "unit", ""),
        table=table,
        trials=tuple(trials.done.values()),
    )


# -- evaluating ------------------------------------------------------------------------------------------------------


@dataclass
class _Trials:
    """Evaluates plans, each once, up to a bound."""

    evaluate: Callable[[PrunePlan], float]
    template: PrunePlan
    prices: PlanCosts
    limit: int
    on_step: Callable[[str], None]
    done: dict[tuple[int, Stages], Trial] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.limit - len(self.done)

    @property
    def first(self) -> int:
        return self.template.protect.first

    def protecting(self, first: int) -> _Trials:
        """The same trials, to go on with so many tokens protected at the start of each row."""
        protect = replace(self.template.protect, first=first)
        prices = replace(self.prices, protect=protect, _known={})
        return replace(self, template=replace(self.template, protect=protect), prices=prices)

    def plan(self, stages: Stages) -> PrunePlan:
        """The stages, and what all plans have in common."""
        leaving = (replace(stage, leave=self.prices.leave) for stage in stages)
        return replace(self.template, stages=tuple(leaving))

    def has(self, stages: Stages) -> bool:
        return (self.first, stages) in self.done

    def run(self, step: str, stages: Stages) -> Trial:
        key = (self.first, stages)
        if key in self.done:
            return self.done[key]
        self.on_step(step)
        loss = float(self.evaluate(self.plan(stages)))
        if not math.isfinite(loss):
            text = ", ".join(f"{float(s.keep):g} {s.place}" for s in stages) or "no stages"
            raise PruneError(f"The loss of the plan with {text} is {loss}; look at the calibration data and the model.")
        self.done[key] = Trial(step, stages, loss, self.prices.share(stages), self.first)
        return self.done[key]


def _anchors(places: Sequence[int], keeps: int, limit: int) -> list[int]:
    """The layers that single cuts are made at: all, or as many as half of the evaluations allow, evenly spaced."""
    least = 1 + keeps * min(2, len(places)) + 1
    if limit < least:
        raise OptionError(
            f"{option('max_evaluations')} must be at least {least} for a grid of {keeps} keeps, not {limit}."
        )
    count = min(len(places), max(2, limit // (2 * keeps)))
    if count == len(places):
        return list(places)
    return [places[round(i * (len(places) - 1) / (count - 1))] for i in range(count)]


def _single_cuts(trials: _Trials, anchors: Sequence[int], keeps: Sequence[Fraction], dense: float) -> LossTable:
    losses = tuple(tuple(trials.run("single cut", (Stage(layer, keep),)).loss for keep in keeps) for layer in anchors)
    shares = tuple(float(keep) for keep in keeps)
    return LossTable(tuple(anchors), shares, losses, dense, trials.prices.costs.num_blocks)


def _best_candidate(trials: _Trials, space: Space) -> Trial:
    candidates = sorted(space.candidates(_CANDIDATES), key=lambda s: space.table.predict(s))
    return min((trials.run("candidate", stages) for stages in candidates[: trials.left]), key=lambda t: t.loss)


def _best_beginning(
    trials: _Trials, space: Space, best: Trial, beginnings: Sequence[int]
) -> tuple[_Trials, Space, Trial]:
    """The best schedule with more and more tokens protected at the start, and what to improve it with."""
    found = (trials, space, best)
    if trials.template.protect.by_content:
        return found  # a long beginning could leave no room for tokens that were asked for by id or segment
    for first in sorted({n for n in beginnings if n > trials.first}):
        other = trials.protecting(first)
        there = replace(space, prices=other.prices)
        stages = there.fitted(best.stages)
        if stages is None or other.left < 1:
            break  # more protected tokens cost more than the budget, or no evaluations are left
        trial = other.run("beginning", stages)
        if trial.loss < found[2].loss - _WORTH * abs(found[2].loss - space.table.dense):
            found = (other, there, trial)
    return found


def _improved(trials: _Trials, space: Space, best: Trial) -> Trial:
    """Local moves until the finest help no more, or no evaluations are left."""
    for factor in _FACTORS:
        better: Trial | None = best
        while better is not None:
            best, better = better, _first_better(trials, space, better, factor)
    return best


def _first_better(trials: _Trials, space: Space, best: Trial, factor: float) -> Trial | None:
    wanted = best.loss - _WORTH * abs(best.loss - space.table.dense)
    new = [(step, stages) for step, stages in space.neighbours(best.stages, factor) if not trials.has(stages)]
    for step, stages in new[: min(_TRIED, trials.left)]:
        trial = trials.run(step, stages)
        if trial.loss < wanted:
            return trial
    return None


# -- arguments -------------------------------------------------------------------------------------------------------


def _checked_keeps(grid: Sequence[float], lowest: float) -> tuple[tuple[Fraction, ...], Fraction]:
    keeps = sorted({as_fraction(keep, "a keep of the grid") for keep in grid}, reverse=True)
    if not keeps or not 0 < keeps[-1] <= keeps[0] < 1:
        raise OptionError(f"The grid must hold keeps between 0 and 1, not {list(grid)}.")
    least = as_fraction(lowest, "lowest")
    if not 0 < least < 1:
        raise OptionError(f"The lowest keep must lie between 0 and 1, not {lowest}.")
    return tuple(keeps), least


def _checked_layers(layers: Sequence[int] | None, template: PrunePlan, num_blocks: int) -> tuple[int, ...]:
    if layers is None:
        spec = template.scorer
        layers = range(int(scorer_class(spec.name).reads_attention(dict(spec.options))), num_blocks)
    places = tuple(sorted(set(layers)))
    if not places or places[0] < 0 or places[-1] >= num_blocks:
        raise OptionError(
            f"Stages may stand before blocks 0 to {num_blocks - 1} of this model (a scorer of attention needs a block "
            f"before it), but the layers are {list(layers)}."
        )
    return places


def _past_the_embeddings(places: tuple[int, ...], prices: PlanCosts, share: float, least: Fraction) -> tuple[int, ...]:
    """``places`` without block 0, if a budget well below this one is met without.

    Before block 0 a passage's tokens know nothing of the question, and what leaves there is chosen for any question. A
    few calibration rows do not show what that costs: they chose block 0 for a reranker at 2/5 of the FLOPs, and a plan
    from block 1 on had an MRR@10 .5 points higher (254 questions, one seed). On STS-B, whose parts are alike, a
    geometric plan from block 1 on came to a Spearman correlation 1 point higher than the plan found (development set,
    one seed).
    """
    if places[0] != 0 or len(places) < 2:
        return places
    later = places[1:]
    if prices.share([Stage(later[0], least)]) > _EASILY * share:
        return places
    logger.info("search: no stage before block 0, where the parts of a pair have not met")
    return later
