"""Which plan a model gets: the one given, the one in the folder that the model was loaded from, or the default plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prunepass.errors import PlanError
from prunepass.plan.files import PLAN_FILE
from prunepass.plan.plan import PrunePlan, unknown_key

__all__ = ["DEFAULT", "AnyPlan", "Choice", "choose", "found_in", "load_plan", "plan_folder"]

#: what the public functions take for a plan, see `load_plan`
AnyPlan: TypeAlias = PrunePlan | str | os.PathLike[str] | Mapping[str, Any] | None
#: in place of a plan: the default one, whatever lies beside the model
DEFAULT = "default"


@dataclass(frozen=True)
class Choice:
    """A plan and where it is from.

    Attributes:
        plan: None is the default plan, which is made once the model's blocks are known.
        source: where it is from, in words: ``the plan in folder``.
        found: whether it was found beside the model, and not asked for.
    """

    plan: PrunePlan | None
    source: str
    found: bool = False

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A `PlanError` inside says where a plan is from that nobody asked for."""
        try:
            yield
        except PlanError as e:
            if not self.found:
                raise
            raise type(e)(f"{e} It is {self.source}; plan={DEFAULT!r} (--plan {DEFAULT}) takes no notice of it.") from e


def choose(plan: Any, model: Any) -> Choice:
    """The plan for ``model``.

    Args:
        plan: whatever `load_plan` takes. None looks for a plan in the folder that the model was loaded from.
        model: a module; anything else was loaded from nowhere.

    Raises:
        PlanError: there is no such plan, it is wrong, or parts of the model come from folders with different plans.
        WeightsError: its weights cannot be read.
    """
    if plan is not None:
        return Choice(load_plan(plan), _in_words(plan))
    folder = plan_folder(model)
    return Choice(None, "the default plan") if folder is None else found_in(folder)


def found_in(folder: Path) -> Choice:
    """The plan in the folder of a model. Raises as `PrunePlan.from_pretrained`."""
    source = f"the plan in {folder}, the folder that the model was loaded from"
    return Choice(PrunePlan.from_pretrained(folder), source, found=True)


def load_plan(plan: Any) -> PrunePlan | None:
    """A plan from whatever the public functions take: `PrunePlan`, folder, name, JSON text, mapping; ``"default"`` or
    None for the default plan, which gives None."""
    if plan is None or isinstance(plan, PrunePlan) or (isinstance(plan, str) and plan == DEFAULT):
        return plan if isinstance(plan, PrunePlan) else None
    if isinstance(plan, Mapping):
        return _short(plan) if "stages" not in plan else PrunePlan.from_dict(plan)
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        return PrunePlan.from_json(plan)
    if isinstance(plan, (str, os.PathLike)):
        return PrunePlan.from_pretrained(os.fspath(plan))
    raise PlanError(f"A plan is a PrunePlan, a folder, JSON text or a mapping, not {type(plan).__name__}.")


def _short(form: Mapping[str, Any]) -> PrunePlan:
    known = ("keep", "layers", "scorer", "protect", "restore")
    for key in form:
        if key not in known:
            raise PlanError(unknown_key(key, known, "the plan's short form"))
    if missing := [key for key in known[:2] if key not in form]:
        raise PlanError(f"The plan's mapping has neither 'stages' nor, as a short form, {' and '.join(missing)}.")
    return PrunePlan.short(**form)


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
            "Say which plan to take: plan=folder."
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
