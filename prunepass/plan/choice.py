"""The door: whatever a caller says of a plan is read and checked here, once, and goes on as a `Choice`.

`choose` serves every way in (torch.compile, prune, explain, export, bench, the command line). Behind it a plan is a
`PrunePlan`, or a `Draft` where the model's graph has yet to say the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from prunepass.errors import OptionError, PlanError, option
from prunepass.plan.draft import Draft, Planned, Several, prunes
from prunepass.plan.files import PLAN_FILE
from prunepass.plan.plan import PrunePlan, unknown_key

__all__ = [
    "DEFAULT",
    "SHORT",
    "AnyPlan",
    "AnyPlans",
    "Choice",
    "alone",
    "check_short",
    "choose",
    "names_streams",
    "plan_folder",
]

#: in place of a plan: the default one, whatever lies beside the model
DEFAULT = "default"
#: options that describe a plan, in place of one
SHORT = ("keep", "layers", "scorer", "protect", "restore", "leave")


@dataclass(frozen=True)
class Choice:
    """A plan and where it is from.

    Attributes:
        plan: a `Draft` where the model's graph is to say the rest of it.
        source: where it is from, in words: ``the plan in folder``.
        folder: of the model, where it was found beside it and not asked for.
        asks: False for the default plan where nobody asked for one.
    """

    plan: Planned
    source: str
    folder: Path | None = None
    asks: bool = True

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A `PlanError` inside says where a plan is from that nobody asked for."""
        try:
            yield
        except PlanError as e:
            if self.folder is None:
                raise
            raise type(e)(f"{e} It is {self.source}; {option('plan', DEFAULT)} takes no notice of it.") from e


#: what the public functions take for a plan, see `choose`
AnyPlan: TypeAlias = PrunePlan | str | os.PathLike[str] | Mapping[str, Any] | Choice | None
#: and where a list of them makes one program with a level for each
AnyPlans: TypeAlias = AnyPlan | Sequence[AnyPlan]


def choose(plan: AnyPlans, model: Any = None, short: Mapping[str, Any] | None = None) -> Choice:
    """The plan for ``model``.

    Args:
        plan: a `PrunePlan`; a folder, a name or JSON text of one; a mapping, of all of it or of its short form
            (``{"keep": 0.5, "layers": [2, 4]}``); "default"; or a `Choice`, which comes back; or a list of these, for
            a program with a level for each. None looks for a plan in the folder that the model was loaded from, and
            takes the default one where there is none. A mapping of streams to plans is refused: what can do with
            several asks `names_streams` before.
        model: a module; anything else was loaded from nowhere.
        short: options of these names (`SHORT`), in place of ``plan``; None stands for one that is not given. Without
            ``keep`` they change the default plan. A ``restore`` that is not given is the default plan's, by the head.

    Raises:
        OptionError: both are given, or one of ``keep`` and ``layers`` alone.
        PlanError: there is no such plan, it is wrong, or parts of the model come from folders with different plans.
        WeightsError: its weights cannot be read.
    """
    given = {name: value for name, value in (short or {}).items() if value is not None}
    check_short(plan, given)
    if given:
        return Choice(_from_short(given), "the plan given" if "keep" in given else "the default plan, changed")
    if isinstance(plan, Choice):
        return plan
    if isinstance(plan, (list, tuple)):
        return _several(plan, model)
    if plan is not None:
        return Choice(_read(plan), _in_words(plan))
    folder = plan_folder(model)
    if folder is None:
        return Choice(Draft(), "the default plan", asks=False)
    source = f"the plan in {folder}, the folder that the model was loaded from"
    return Choice(PrunePlan.from_pretrained(folder), source, folder)


def names_streams(plan: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether ``plan`` is a mapping of streams to plans, and not the mapping of one plan; see `plan.by_stream`."""
    if not isinstance(plan, Mapping) or not plan:
        return False
    of_one = {*SHORT, *(f.name for f in fields(PrunePlan)), "format", "version"}
    return not any(name in of_one for name in plan) and all(_may_be_a_plan(value) for value in plan.values())


def _may_be_a_plan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, (PrunePlan, Mapping)) for one in value)
    return isinstance(value, (PrunePlan, Choice, str, os.PathLike, Mapping))


def _several(plans: Sequence[Any], model: Any) -> Choice:
    if not plans:
        raise PlanError("The list of plans is empty. Give at least one plan: level 1 is the first, level 0 keeps all.")
    choices = [choose(plan, model) for plan in plans]
    parts = [plan for choice in choices for plan in _single(choice.plan)]
    return Choice(Several(tuple(parts)), f"{len(parts)} plans, a level for each")


def alone(choice: Choice) -> Choice:
    """``choice`` itself. Raises `PlanError` where it is of several plans, for what looks at one of them."""
    if isinstance(choice.plan, Several):
        raise PlanError(
            "A list of plans is for prunepass.prune, prunepass.export and torch.compile, where a level chooses among "
            "them at each call. Give a single plan here, and call once for each."
        )
    return choice


def _single(plan: Planned) -> tuple[PrunePlan | Draft, ...]:
    return plan.plans if isinstance(plan, Several) else (plan,)


def check_short(plan: Any, short: Mapping[str, Any]) -> None:
    """Whether options go together, before anything is read.

    Args:
        short: those of `SHORT` that are given.

    Raises:
        OptionError: they do not; the message names them as the caller writes them.
    """
    if plan is not None and short:
        names = ", ".join(option(name) for name in short)
        raise OptionError(f"There are both a plan and {names}. {option('plan')} says everything: leave out {names}.")
    if ("keep" in short) != ("layers" in short):
        one, other = ("keep", "layers") if "keep" in short else ("layers", "keep")
        raise OptionError(
            f"{option(one)} needs {option(other)} beside it: {option('keep', 0.5)} and {option('layers', [2, 4])}, say."
        )


def _from_short(given: Mapping[str, Any]) -> Planned:
    if "keep" in given:
        plan = PrunePlan.short(**given)
        if "restore" in given or not prunes(plan):
            return plan
        return Draft({"stages": plan.stages, "scorer": plan.scorer, "protect": plan.protect})
    checked = PrunePlan.short(1, [0], **given)  # of the stages nothing is taken
    fields = {name: getattr(checked, name) for name in given if name != "leave"}
    return Draft(fields, leave=given.get("leave"))


def _read(plan: Any) -> Planned:
    if isinstance(plan, PrunePlan):
        return plan
    if isinstance(plan, str) and plan == DEFAULT:
        return Draft()
    if names_streams(plan):
        raise PlanError(
            f"The mapping gives a plan to each of {', '.join(map(repr, plan))}. Such a mapping is for prunepass.prune, "
            "explain and export, and for torch.compile, of a vision-language model with images. Give one plan here."
        )
    if isinstance(plan, Mapping):
        return PrunePlan.from_dict(plan) if "stages" in plan else _from_mapping(plan)
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        return PrunePlan.from_json(plan)
    if isinstance(plan, (str, os.PathLike)):
        return PrunePlan.from_pretrained(os.fspath(plan))
    raise PlanError(f"A plan is a PrunePlan, a folder, JSON text or a mapping, not {type(plan).__name__}.")


def _from_mapping(form: Mapping[Any, Any]) -> Planned:
    if form and all(type(key) is int for key in form):
        raise PlanError(
            "The keys of a plan's mapping are names, not layers. In the short form layers and what they keep are two "
            f'lists: {{"layers": {list(form)}, "keep": {list(form.values())}}}.'
        )
    for key in form:
        if key not in SHORT:
            raise PlanError(unknown_key(key, SHORT, "the plan's short form"))
    if missing := [key for key in SHORT[:2] if key not in form]:
        raise PlanError(f"The plan's mapping has neither 'stages' nor, as a short form, {' and '.join(missing)}.")
    return _from_short(form)


def _in_words(plan: Any) -> str:
    if isinstance(plan, str) and plan == DEFAULT:
        return "the default plan, as asked for"
    is_place = isinstance(plan, os.PathLike) or (isinstance(plan, str) and not plan.lstrip().startswith("{"))
    return f"the plan in {os.fspath(plan)}" if is_place else "the plan given"


def plan_folder(model: Any) -> Path | None:
    """The folder with a plan that a model of transformers, or one inside ``model``, was loaded from; None if there is
    none.

    Raises:
        PlanError: there are several.
    """
    own = _folder_with_plan(model)
    if own is not None:
        return own
    modules = getattr(model, "modules", None)
    found = {_folder_with_plan(module) for module in modules()} - {None} if callable(modules) else set()
    if len(found) > 1:
        raise PlanError(
            f"Parts of the model were loaded from folders that each hold a plan: {', '.join(sorted(map(str, found)))}. "
            f"Say which plan to take: {option('plan', 'folder')}."
        )
    return found.pop() if found else None


def _folder_with_plan(module: Any) -> Path | None:
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    try:
        return Path(name) if (Path(name) / PLAN_FILE).is_file() else None
    except (OSError, ValueError):  # a name that can be no path
        return None
