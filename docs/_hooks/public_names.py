"""Which public names there are, and which of them lack a docstring or a place in the reference."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent.parent / "reference"
#: whose ``__all__`` is public
MODULES = (
    "prunepass",
    "prunepass.backends",
    "prunepass.bulk",
    "prunepass.errors",
    "prunepass.scorers",
    "prunepass.training",
)
#: public names that are reached by their own modules
NAMES = (
    "prunepass.dynamo.backend.Compilation",
    "prunepass.dynamo.backend.Options",
    "prunepass.dynamo.backend.compilations",
    "prunepass.dynamo.backend.tokprune",
    "prunepass.plan.files.shipped",
    "prunepass.report.bench.BenchResult",
    "prunepass.report.bench.bench",
)
_ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


def public() -> dict[str, Any]:
    """Every public name with what it stands for."""
    found = {f"{m}.{name}": getattr(import_module(m), name) for m in MODULES for name in import_module(m).__all__}
    for path in NAMES:
        module, _, name = path.rpartition(".")
        found[path] = getattr(import_module(module), name)
    return found


def faults() -> list[str]:
    """One line for each public name without a docstring, or without an entry under docs/reference."""
    listed = {entry for page in REFERENCE.glob("*.md") for entry in _ENTRY.findall(page.read_text(encoding="utf-8"))}
    documented = {id(_resolved(entry)) for entry in listed}
    names = public()
    missing = [f"{path}: not in docs/reference" for path, value in names.items() if id(value) not in documented]
    return [*missing, *undocumented(names)]


def undocumented(names: dict[str, Any]) -> list[str]:
    """One line for each class, function or method of ours that has no docstring of its own."""
    return [
        f"{path}: no docstring"
        for name, value in names.items()
        for path, thing in [(name, value), *_members(name, value)]
        if (inspect.isclass(thing) or callable(thing) or isinstance(thing, property)) and not _docstring(thing)
    ]


def _members(name: str, value: Any) -> list[tuple[str, Any]]:
    if not inspect.isclass(value):
        return []
    return [
        (f"{name}.{key}", member.__func__ if isinstance(member, (classmethod, staticmethod)) else member)
        for key, member in vars(value).items()
        if not key.startswith("_") and (inspect.isroutine(member) or isinstance(member, (property, classmethod)))
    ]


def _docstring(thing: Any) -> str:
    text = thing.__doc__ or ""
    generated = inspect.isclass(thing) and dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if generated else text.strip()


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
