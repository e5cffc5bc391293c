"""What a benchmark task is: a dataclass of options that names its cells and turns their rows into a page.

A new task is one file in ``benchmarks/tasks`` with a class ``Benchmark``; the first line of its module's docstring says
what it compares and is its ``--help``. The runner measures cells that have no rows yet, keeps every row as soon as it
is there, and makes ``docs/figures/<task>.md`` from what `Task.page` gives.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from benchmarks import tasks
from benchmarks.store import Group
from prunepass.errors import OptionError

Rows = Iterable[dict[str, Any]]
Say = Callable[[str], None]


def option(default: Any, help: str, *, type: Callable[[str], Any] | None = None, factory: bool = False) -> Any:
    """A field of a task that the command line sets; a tuple is given with commas.

    Args:
        type: of one value; needed where ``default`` is None or empty.
        factory: ``default`` makes the default.
    """
    given: dict[str, Any] = {"default_factory": default} if factory else {"default": default}
    return field(**given, metadata={"help": help, "type": type})


@dataclass(frozen=True)
class Cell:
    """What is measured at once, and left alone where it has rows.

    Attributes:
        key: tells it from others; becomes part of what its rows share.
        measure: from the budgets wanted to what the rows share and the rows, which may come one by one.
        budgets: values of the rows' ``budget`` that must be there; those that are there already are measured again
            with new ones, for all ways of a group run in the same turns.
        why_not: why it cannot be measured here.
    """

    key: Mapping[str, Any]
    measure: Callable[[Sequence[str]], tuple[Mapping[str, Any], Rows]]
    budgets: tuple[str, ...] = ()
    why_not: str | None = None

    def __str__(self) -> str:
        return " ".join(str(value) for value in self.key.values())


@dataclass(frozen=True)
class Task:
    """Base of all tasks. A task that only prepares something, such as a model, overrides `prepare` alone."""

    title: ClassVar[str] = ""
    introduction: ClassVar[str] = ""

    def prepare(self, say: Say) -> None:
        """Runs before all cells."""

    def cells(self) -> Iterator[Cell]:
        """What to measure.

        Raises:
            OptionError: an option names something unknown; nothing has been measured then.
        """
        return iter(())

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterable[str]:
        """Parts of the Markdown page, below its title and introduction, of groups that have rows."""
        return ()

    @classmethod
    def pictures(cls, groups: Sequence[Group]) -> Mapping[str, Callable[[Path], None]]:
        """Names of SVG files beside the page, and what draws each."""
        return {}


def names() -> list[str]:
    """Of all tasks, as the command line takes them."""
    return sorted(found.name.replace("_", "-") for found in pkgutil.iter_modules(tasks.__path__))


def summary(name: str) -> str:
    """What a task compares, in one line, without importing what it needs."""
    files = (Path(folder, f"{name.replace('-', '_')}.py") for folder in tasks.__path__)
    file = next(file for file in files if file.is_file())
    return str(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))).splitlines()[0]


def load(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        OptionError: there is no such task.
    """
    if name not in names():
        raise OptionError(f"There is no benchmark {name!r}; there are {', '.join(names())}.")
    module: ModuleType = importlib.import_module(f"{tasks.__name__}.{name.replace('-', '_')}")
    found: type[Task] = module.Benchmark
    return found


def chosen(name: str, known: Iterable[str], what: str) -> str:
    """The name, where it is known. Raises `OptionError` else."""
    if name not in (known := list(known)):
        raise OptionError(f"There is no {what} {name!r}; there are {', '.join(known)}.")
    return name
