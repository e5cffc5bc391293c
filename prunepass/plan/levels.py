"""Several plans in one program, one chosen at each call: level 0 keeps all tokens, level i is the i-th plan."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from prunepass.errors import OptionError, PlanError, option
from prunepass.plan.parts import Stage
from prunepass.plan.plan import PrunePlan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_LEVEL", "LEVEL", "Levels", "chosen_level", "level", "level_example"]

#: name of the input that chooses
LEVEL = "level"
#: of calls that say none: the first plan given, as a caller who knows of no levels has asked for a pruned model
DEFAULT_LEVEL = 1

_chosen: ContextVar[int | None] = ContextVar("prunepass_level", default=None)
_Place = tuple[int, bool]


@contextmanager
def level(number: int) -> Iterator[None]:
    """Calls inside run at this level, where a model was pruned or compiled with a list of plans.

    It holds for the calls of this thread (or task), and a ``level`` given to the call itself goes before it. Models of
    one plan take no notice of it.

    Args:
        number: 0 for the model with all its tokens, i for the i-th plan of the list. Outside of any such block a call
            runs at level 1.

    Raises:
        OptionError: it is no whole number of at least 0. A call raises it where its model has no such level.
    """
    token = _chosen.set(_whole(number))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_level(count: int, given: Any = None) -> int:
    """The level of a call of a model with ``count`` plans: ``given``, or what `level` says, or 1.

    Raises:
        OptionError: there is no such level.
    """
    if given is None:
        given = _chosen.get()
    number = DEFAULT_LEVEL if given is None else _whole(given)
    if number > count:
        plans = "1 (the plan)" if count == 1 else f"1 to {count} (the plans)"
        raise OptionError(f"There is no {option(LEVEL, number)}: choose 0 (all tokens) or {plans}.")
    return number


def level_example(device: Any = None) -> Tensor:
    """A value of the input `LEVEL`, [1] int64, to trace with."""
    import torch

    return torch.tensor([DEFAULT_LEVEL], device=device)


def _whole(number: Any) -> int:
    try:
        whole = -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        whole = -1
    if whole < 0:
        raise OptionError(f"{option(LEVEL)} must be a whole number of at least 0, not {number!r}.")
    return whole


@dataclass(frozen=True)
class Levels:
    """Plans that one program has, by the stages of all of them.

    Attributes:
        plans: those of levels 1, 2, ...
        plan: with a stage at each place where one of them has one, each as deep as the deepest of them.
    """

    plans: tuple[PrunePlan, ...]
    plan: PrunePlan

    @classmethod
    def of(cls, plans: Sequence[PrunePlan]) -> Levels:
        """The levels of some plans.

        Raises:
            PlanError: none leaves a token out; or they differ in what one program has once.
        """
        for name, told in _SHARED.items():
            _check_alike(f"differ in {name}", [told(plan) for plan in plans])
        stages = [{_place(stage): stage for stage in plan.stages if stage.keep != 1} for plan in plans]
        places = sorted({place for by_place in stages for place in by_place})
        if not places:
            raise PlanError("None of the plans leaves a token out, so there is nothing to choose: give a single plan.")
        union: list[Stage] = []
        weights: dict[str, Tensor] = {}
        for index, place in enumerate(places):
            own = [by_place.get(place) for by_place in stages]
            first = next(stage for stage in own if stage is not None)
            specs = [plan.scorer_of(plan.stages.index(s)) for plan, s in zip(plans, own, strict=True) if s is not None]
            _check_alike(f"score tokens differently {first.place}", specs)
            _check_alike(f"differ in how tokens leave {first.place}", [s.leave for s in own if s is not None])
            keep = min(_keep_at(plan, place) for plan in plans)
            union.append(replace(first, keep=keep, scorer=specs[0]))
            plan = plans[own.index(first)]
            prefix = f"stages.{plan.stages.index(first)}."
            weights |= {
                f"stages.{index}.{k.removeprefix(prefix)}": w for k, w in plan.weights.items() if k.startswith(prefix)
            }
        return cls(tuple(plans), replace(plans[0], stages=tuple(union), weights=weights))

    def shares(self) -> list[list[Fraction]]:
        """By level, from 0 on, what each stage of `plan` keeps of the row: where it does not act, what is left."""
        places = [_place(stage) for stage in self.plan.stages]
        dense = [Fraction(1)] * len(places)
        return [dense, *([_keep_at(plan, place) for place in places] for plan in self.plans)]

    def at(self, number: int) -> PrunePlan:
        """The plan of a level; that of level 0 has no stages."""
        return self.plans[number - 1] if number else replace(self.plan, stages=(), weights={})

    def weights_of(self, index: int) -> tuple[list[dict[str, Tensor]], list[int]]:
        """The different sets of weights that a stage of `plan` has, by parameter name, and by level which one.

        Levels in which the stage does not act have any of them.

        Raises:
            PlanError: their shapes differ.
        """
        place = _place(self.plan.stages[index])
        sets: list[dict[str, Tensor]] = []
        which = [0]
        for plan in self.plans:
            own = next((i for i, stage in enumerate(plan.stages) if _place(stage) == place and stage.keep != 1), None)
            if own is None:
                which.append(0)
                continue
            weights = plan.all_weights_of(own)
            found = next((i for i, other in enumerate(sets) if _same(weights, other)), None)
            if found is None:
                found = len(sets)
                sets.append(weights)
            which.append(found)
        shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in sets]
        _check_alike(f"have predictors of different shapes {self.plan.stages[index].place}", shapes)
        return sets, which


def _place(stage: Stage) -> _Place:
    return stage.layer, stage.after_attention


def _keep_at(plan: PrunePlan, place: _Place) -> Fraction:
    """What is left behind a place in a plan, whether or not a stage stands there."""
    return min((stage.keep for stage in plan.stages if _place(stage) <= place), default=Fraction(1))


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    if one.keys() != two.keys():
        return False
    return all(
        w.shape == two[k].shape and w.dtype == two[k].dtype and bool((w == two[k]).all()) for k, w in one.items()
    )


#: what one program has once, and how a plan says it
_SHARED: dict[str, Callable[[PrunePlan], Any]] = {
    "protect": lambda plan: plan.protect,
    "restore": lambda plan: plan.restore,
    "stream": lambda plan: plan.stream,
}


def _check_alike(what: str, said: Sequence[Any]) -> None:
    """Raises `PlanError` where plans differ; ``said`` is what each of them says."""
    other = next((one for one in said if one != said[0]), None)
    if other is not None:
        raise PlanError(
            f"The plans {what}: {said[0]} and {other}. One program can have only one: change the plans so that "
            "they agree, or export a folder for each."
        )
