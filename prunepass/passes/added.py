"""Passes that say themselves where they run: a file in this folder with a pass that names the one it runs before."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module

from prunepass import passes
from prunepass.errors import OptionError
from prunepass.passes.contract import Pass, SitePass

__all__ = ["before", "found"]


def before(step: Pass) -> Iterator[Pass]:
    """The passes that run before ``step``, at its stage where it works at one."""
    for kind in found().get(step.name, ()):
        yield kind(step.site) if issubclass(kind, SitePass) and isinstance(step, SitePass) else kind()


@functools.cache
def found() -> Mapping[str, tuple[type[Pass], ...]]:
    """By the name of a pass, those that run before it, in the order of their files' names.

    Raises:
        OptionError: a pass names none that there is, or works at a stage and names one that does not.
    """
    kinds = [kind for file in pkgutil.iter_modules(passes.__path__) for kind in _in_file(file.name)]
    named = {kind.name: kind for kind in kinds}
    for kind in kinds:
        if kind.before and kind.before not in named:
            raise OptionError(f"{kind.__name__} runs before {kind.before!r}; there are {', '.join(sorted(named))}.")
        if kind.before and issubclass(kind, SitePass) and not issubclass(named[kind.before], SitePass):
            raise OptionError(f"{kind.__name__} works at a stage, and {kind.before!r}, before which it runs, does not.")
    return {name: tuple(kind for kind in kinds if kind.before == name) for name in named}


def _in_file(name: str) -> Iterator[type[Pass]]:
    module = import_module(f"{passes.__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__ and value.name:
            yield value
