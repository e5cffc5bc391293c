"""Table and plots, made from the results at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy import results
from benchmarks.accuracy.cells import ROWS, TaskFigures, as_budget, by_task
from benchmarks.accuracy.tables import markdown
from benchmarks.accuracy.truncation import SHARES
from prunepass.errors import OptionError

__all__ = ["write"]

#: lines of the plots; baselines are grey
STYLES: dict[str, dict[str, Any]] = {
    "truncated": {"color": "0.4", "linestyle": "--"},
    "random": {"color": "0.7", "linestyle": ":"},
    "attention": {"color": "0.7", "linestyle": "-."},
    "search": {"color": "tab:cyan"},
    "top": {"color": "tab:orange"},
    "sdtp": {"color": "tab:green"},
    "both": {"color": "tab:blue"},
}
COLUMNS = 3
Line = list[tuple[float, float]]


def write(folder: Path = results.FOLDER) -> list[Path]:
    """Write ``table.md`` and ``pareto.png`` into the folder of results, and ``latency.png`` where it was measured.

    Returns:
        the files written.

    Raises:
        OptionError: there are no results, or those of a task do not belong together.
    """
    tasks = by_task(results.read(folder))
    if not tasks:
        raise OptionError(f"There are no results in {folder}; make some with the command run.")
    deployed = list(results.read_deployed(folder))
    table = folder / "table.md"
    table.write_text(markdown(tasks, deployed), encoding="utf-8")
    written = [table, _pareto(tasks, folder / "pareto.png")]
    timed = [task for task in tasks if any(record["task"] == task.name for record in deployed)]
    if timed:
        written.append(_latency(timed, deployed, folder / "latency.png"))
    return written


def _pareto(tasks: Sequence[TaskFigures], file: Path) -> Path:
    def lines(task: TaskFigures) -> dict[str, Line]:
        found = {row: [cell for share in SHARES if (cell := task.cell(row, share))] for row in ROWS}
        return {row: [(cell.flops, 100 * cell.score) for cell in cells] for row, cells in found.items()}

    return _panels(tasks, lines, "FLOPs kept, on real tokens", file)


def _latency(tasks: Sequence[TaskFigures], records: Sequence[Mapping[str, Any]], file: Path) -> Path:
    def lines(task: TaskFigures) -> dict[str, Line]:
        mine = [record for record in records if record["task"] == task.name]
        return {row: _timed(task, row, mine) for row in ("dense", "truncated", "both")}

    return _panels(tasks, lines, "milliseconds a text (OpenVINO, batch 1)", file)


def _timed(task: TaskFigures, row: str, records: Sequence[Mapping[str, Any]]) -> Line:
    """(milliseconds, headline in %) of a row by budget, both the mean over the seeds, as far as both are known."""
    times: dict[Fraction, list[float]] = {}
    for record in records:
        for way in record["latency"]["ways"]:
            if way["row"] == row:
                times.setdefault(as_budget(way["budget"]), []).append(way["milliseconds"])
    scores = {budget: _score(task, row, budget, records) for budget in times}
    return [(fmean(times[b]), 100 * score) for b in sorted(times, reverse=True) if (score := scores[b]) is not None]


def _score(task: TaskFigures, row: str, budget: Fraction, records: Sequence[Mapping[str, Any]]) -> float | None:
    if row == "dense":
        return task.dense
    if row == "both":  # what was timed is what was scored, in the runtime's own precision
        found = [f for record in records for f in record["budgets"] if as_budget(f["budget"]) == budget]
        return fmean(f["timed"][task.headline] for f in found)
    cell = task.cell(row, budget)
    return None if cell is None else cell.score


def _panels(
    tasks: Sequence[TaskFigures], lines: Callable[[TaskFigures], Mapping[str, Line]], label: str, file: Path
) -> Path:
    """One panel a task; the dense model's figure is a level line, and a point where it has a place of its own."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(tasks))
    height = math.ceil(len(tasks) / columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(3.6 * columns, 3 * height), layout="constrained", squeeze=False
    )
    shown: dict[str, Any] = {}
    for panel, task in zip(grid.flat, tasks, strict=False):
        shown["dense"] = panel.axhline(100 * task.dense, color="0.2", linewidth=0.8)
        for row, points in lines(task).items():
            if points:
                style = STYLES.get(row, {"color": "0.2"})
                name = ROWS.get(row, row)
                (line,) = panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
                shown.setdefault(name, line)
        panel.set_title(f"{task.name} ({task.headline}, %)", fontsize=9)
        panel.set_xlabel(label, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in grid.flat[len(tasks) :]:
        panel.set_axis_off()
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(4, len(shown)), fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
