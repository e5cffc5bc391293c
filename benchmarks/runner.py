"""The one command line of all benchmarks: it measures the cells that have no rows yet, and makes pages from rows."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks import store, task
from benchmarks.store import Group
from benchmarks.task import Cell, Task
from prunepass.errors import PruneError

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: "written", "there already", "skipped" or "failed", with a reason."""

    cell: str
    what: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.cell}: {self.what}" + (f": {self.reason}" if self.reason else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks TASK [options]``, or ``python -m benchmarks tables``."""
    listed = "\n".join(f"  {name:<20}{task.summary(name)}" for name in task.names())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure. Rows go to benchmarks/results, one compact line a cell; what is there is left alone.",
        epilog=f"tasks:\n{listed}\n  {'tables':<20}Make the pages and pictures of docs/figures from the rows at hand.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=[*task.names(), "tables"], metavar="TASK", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the task; TASK --help lists them")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        if given.task == "tables":
            _tables(given.options)
        else:
            _measure(given.task, given.options)
    except PruneError as e:
        raise SystemExit(str(e)) from e


def _measure(name: str, options: Sequence[str]) -> None:
    made, folder, again = parse(task.load(name), name, options)
    made.prepare(print)
    failed = 0
    for outcome in run(name, made, folder, again=again):
        print(outcome, flush=True)
        failed += outcome.what == "failed"
    if failed:
        raise PruneError(f"{failed} of the cells asked for failed; the reasons stand above.")


def run(name: str, made: Task, folder: Path = store.RESULTS, *, again: bool = False) -> Iterable[Outcome]:
    """Measure each cell that has no rows for all its budgets; gives what became of each as soon as it is done."""
    for cell in list(made.cells()):
        yield _run(name, cell, folder, again)


def _run(name: str, cell: Cell, folder: Path, again: bool) -> Outcome:
    there = store.find(store.read(name, folder), cell.key)
    kept = {row["budget"] for row in there.rows if "budget" in row} if there and not again else set()
    if there and there.complete and not again and kept.issuperset(cell.budgets):
        return Outcome(str(cell), "there already")
    if cell.why_not:
        return Outcome(str(cell), "skipped", cell.why_not)
    wanted = sorted(kept | set(cell.budgets), key=Fraction, reverse=True) if cell.budgets else ()
    began = time.perf_counter()
    try:
        shared, rows = cell.measure(wanted)
        group = Group({**cell.key, **shared})
        for row in rows:
            group.rows.append(row)
            if not (there and there.complete):  # rows of an earlier run stay until the new ones are all there
                store.put(name, cell.key, group, folder)
    except Exception as e:  # runtimes raise of every kind, and hours of other cells may stand behind this one
        log.debug("%s failed", cell, exc_info=True)
        return Outcome(str(cell), "failed", f"{type(e).__name__}: {e}")
    group.shared["seconds"] = round(time.perf_counter() - began)
    store.put(name, cell.key, group, folder)
    return Outcome(str(cell), "written")


# -- pages -----------------------------------------------------------------------------------------------------------


def _tables(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables", description="Pages and pictures from rows.")
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the rows")
    parser.add_argument("--to", type=Path, default=FIGURES, help="folder of the pages")
    given = parser.parse_args(options)
    for path in write_pages(given.results, given.to):
        print(f"Written: {path}")


def write_pages(results: Path = store.RESULTS, to: Path = FIGURES) -> list[Path]:
    """Write ``<task>.md``, and pictures, of every task that has rows; gives the files."""
    to.mkdir(parents=True, exist_ok=True)
    written = []
    for name in task.names():
        if not (groups := _with_rows(name, results)):
            continue
        file = to / f"{name}.md"
        file.write_text(page(name, groups), encoding="utf-8")
        written.append(file)
        for picture, draw in task.load(name).pictures(groups).items():
            draw(to / picture)
            written.append(to / picture)
    return written


def page(name: str, groups: Sequence[Group]) -> str:
    """A task's page; ``groups`` have rows."""
    made = task.load(name)
    note = f"Made by `python -m benchmarks tables` from the rows in `benchmarks/results/{name}.jsonl`; do not edit."
    parts = [f"# {made.title}", note, made.introduction, *made.page(groups)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_rows(name: str, results: Path) -> list[Group]:
    return [group for group in store.read(name, results) if group.rows]


# -- options ---------------------------------------------------------------------------------------------------------


def parse(made: type[Task], name: str, options: Sequence[str]) -> tuple[Task, Path, bool]:
    """The task with its options, where its rows lie, and whether to measure what has rows."""
    about = task.summary(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for one in fields(made):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        how: dict[str, Any] = {"help": one.metadata["help"], "default": default}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            how["type"] = _several(one.metadata["type"] or type(default[0]))
            how["metavar"] = "A,B,..."
        else:
            how["type"] = one.metadata["type"] or type(default)
        parser.add_argument(f"--{one.name.replace('_', '-')}", **how)
    parser.add_argument("--again", action="store_true", help="measure what has rows already")
    parser.add_argument("--folder", type=Path, default=store.RESULTS, help="of the rows")
    given = vars(parser.parse_args(options))
    folder, again = given.pop("folder"), given.pop("again")
    return made(**given), folder, again


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    words: dict[Any, str] = {
        int: "whole numbers such as 128,512",
        Fraction: "fractions between 0 and 1 such as 1/2,1/4",
    }

    def read(text: str) -> tuple[Any, ...]:
        try:
            found = tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except (ValueError, ZeroDivisionError):
            found = ()
        if not found or (kind is Fraction and not all(0 < share < 1 for share in found)):
            raise argparse.ArgumentTypeError(f"takes {words.get(kind, 'names with commas between')}, not {text!r}.")
        return found

    return read
