"""Plans for several parts of a model: the language model and the towers of one that sees, or streams of one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from torch import nn

from prunepass.errors import OptionError, PlanError
from prunepass.graph.towers import module_named
from prunepass.graph.vision import language_model_of
from prunepass.plan.choice import Choice, choose
from prunepass.plan.draft import Draft, Several, prunes
from prunepass.plan.plan import PrunePlan

__all__ = ["StreamPlans", "plans_by_stream", "plans_of_streams"]


@dataclass(frozen=True)
class StreamPlans:
    """Which plan each part of a vision-language model gets.

    Attributes:
        language: that of the language model; None where it keeps all of its tokens.
        towers: those of modules outside it, by their paths in the model.
    """

    language: Choice | None
    towers: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        """Whether some stage of some plan keeps less than all."""
        given = [*self.towers.values()] if self.language is None else [self.language, *self.towers.values()]
        return any(prunes(choice.plan) for choice in given)


def plans_by_stream(plans: Mapping[str, Any], model: Any) -> StreamPlans:
    """Read a mapping of streams to plans.

    Args:
        plans: by the path of a module, or by the end of its path (``vision_tower``), what `choose` takes for one plan.
        model: a vision-language model.

    Raises:
        OptionError: a list of plans for one part.
        PlanError: the model is no vision-language model; a name is no module's, or several modules'; two modules
            overlap; a plan names a stream itself, or is wrong.
        WeightsError: weights of a plan cannot be read.
    """
    decoder = language_model_of(model)
    if decoder is None:
        raise PlanError(
            f"The mapping gives a plan to each of {', '.join(map(repr, plans))}, and {type(model).__name__} is no "
            "vision-language model of transformers. torch.compile takes a mapping for those only. Use prunepass.prune, "
            "which takes it for other models, too, or give one plan whose stream says which part is pruned: "
            "PrunePlan(stream=...)."
        )
    language = next(path for path, module in model.named_modules() if module is decoder)
    chosen = {module_named(model, name): _one(plan, name, model) for name, plan in plans.items()}
    if len(chosen) < len(plans):
        raise PlanError(f"Two of the names {', '.join(map(repr, plans))} are of one module. Give each part one plan.")
    for path in chosen.keys() - {language}:
        if _overlap(path, language):
            raise PlanError(
                f"The module {path!r} holds, or stands in, the language model of {type(model).__name__}, {language!r}. "
                "Give the plan to that one; a tower is a module outside it."
            )
    for one, other in combinations(chosen, 2):
        if _overlap(one, other):
            raise PlanError(f"The mapping has plans for {one!r} and {other!r}, of which one holds the other. Name one.")
    return StreamPlans(chosen.pop(language, None), chosen)


def plans_of_streams(plans: Mapping[str, Any], model: Any) -> tuple[Choice, ...]:
    """Read a mapping of streams to plans for a model that is one graph, which says later whether it has the streams.

    Args:
        plans: by the path of a module around a stream, as in ``PrunePlan(stream=...)``, what `choose` takes for one
            plan.

    Returns:
        For each, in order, a plan that names its stream.

    Raises:
        OptionError: a list of plans for one stream.
        PlanError: a plan names a stream itself, or is wrong.
        WeightsError: weights of a plan cannot be read.
    """
    return tuple(_of_stream(_one(plan, name, model), name) for name, plan in plans.items())


def _of_stream(choice: Choice, name: str) -> Choice:
    plan = choice.plan
    if isinstance(plan, Draft):
        return replace(choice, plan=replace(plan, given={**plan.given, "stream": name}))
    assert isinstance(plan, PrunePlan)  # `_one` takes no several
    return replace(choice, plan=replace(plan, stream=name))


def _one(plan: Any, name: str, model: nn.Module) -> Choice:
    choice = choose(plan, model)
    if isinstance(choice.plan, Several):
        raise OptionError(f"The mapping has several plans for {name!r}, which takes one. Give a single plan.")
    given = choice.plan.given.get("restore") if isinstance(choice.plan, Draft) else choice.plan.restore
    if given == "none":
        raise PlanError(
            f"The plan for {name!r} says restore='none', and what reads it takes outputs of full length. Say "
            "restore='last', or 'mean'."
        )
    if choice.plan.stream is not None:
        raise PlanError(
            f"The plan for {name!r} says stream={choice.plan.stream!r} itself. Leave it out: the mapping says it."
        )
    return choice


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
