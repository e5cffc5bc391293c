"""One scorer a file, found by its name: ``norm.py`` holds the scorer "norm", and nothing else has to know of it.

`scorer_class` finds one by name; `register` adds one from outside.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import TYPE_CHECKING, TypeVar

from prunepass.errors import PlanError
from prunepass.scorers.base import Attention, Hosts, ScoreInputs, Scorer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Attention", "Hosts", "ScoreInputs", "Scorer", "check_weights", "names", "register", "scorer_class"]

#: files of this folder that hold no scorer
_SHARED = frozenset({"base", "lens", "queries"})
_REGISTERED: dict[str, type[Scorer]] = {}
_GROUP = "prunepass.scorers"  # entry points of other packages: name = module:Class

S = TypeVar("S", bound=type[Scorer])


def _built_in() -> set[str]:
    """Names of the files in this folder that hold a scorer; nothing is imported."""
    return {file.name for file in pkgutil.iter_modules(__path__)} - _SHARED


def register(cls: S) -> S:
    """Make a scorer known under its ``name``; usable as a class decorator.

    Raises:
        PlanError: the name is empty or taken by another class.
    """
    if not cls.name:
        raise PlanError(f"{cls.__name__} has no name: set the class attribute `name` that plans refer to it by.")
    if cls.name in _built_in() or _REGISTERED.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise PlanError(f"A scorer named {cls.name!r} exists already. Give {cls.__name__} another name.")
    _REGISTERED[cls.name] = cls
    return cls


def names() -> list[str]:
    """All known scorers."""
    return sorted({*_built_in(), *_REGISTERED, *(e.name for e in metadata.entry_points(group=_GROUP))})


def scorer_class(name: str) -> type[Scorer]:
    """The scorer of that name. Raises `PlanError` with the nearest known name."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _built_in():
        return _in_file(name)
    for entry in metadata.entry_points(group=_GROUP, name=name):
        loaded: type[Scorer] = entry.load()
        return loaded
    near = difflib.get_close_matches(name, names(), n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"There is no scorer named {name!r}.{guess} Known: {', '.join(names())}.")


def _in_file(name: str) -> type[Scorer]:
    """The scorer of that name in the file of that name."""
    module = import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Scorer) and value.name == name:
            return value
    raise PlanError(f"{module.__file__} holds no scorer whose name is {name!r}, as its file's is.")


def check_weights(name: str, weights: Mapping[str, Tensor], where: str) -> None:
    """Raise `WeightsError` where ``weights`` are not those of the scorer ``name``, as far as it is one of ours.

    Others say so when they are loaded: until then a plan may name a scorer that is not registered yet.
    """
    if name in _built_in():
        scorer_class(name).check_weights(weights, where)
