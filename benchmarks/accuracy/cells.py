"""Records of results brought together by task: one cell a row and budget, the mean over the seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any

from benchmarks.accuracy.tasks import TASKS
from prunepass.errors import OptionError

__all__ = ["ROWS", "Cell", "TaskFigures", "as_budget", "by_task", "flops_ratios"]

#: what tables and plots call the rows, in their order
ROWS = {
    "truncated": "text cut short",
    "random": "random",
    "attention": "attention, training-free",
    "search": "trained predictors, frozen model",
    "top": "ToP",
    "sdtp": "SDTP",
    "both": "both together",
}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row at one budget.

    Attributes:
        score: the task's headline figure, in [0, 1]; the mean over the seeds.
        spread: half the way from the worst seed to the best.
        flops: real FLOPs on real tokens as a share of the dense model's; the mean over the seeds.
    """

    score: float
    spread: float
    flops: float
    seeds: int


@dataclass(frozen=True)
class TaskFigures:
    """Everything that is known of a task.

    Attributes:
        headline: name of the figure that is shown.
        examples: how many test examples it was measured on.
        dense: the dense model's figure.
        dense_flops: the dense model's FLOPs by kind of padding (`prunepass.cost.CorpusFlops`); None where no record
            has them.
    """

    name: str
    headline: str
    long_text: bool
    examples: int
    dense: float
    dense_flops: Mapping[str, int] | None
    cells: Mapping[tuple[str, Fraction], Cell]

    def cell(self, row: str, budget: Fraction) -> Cell | None:
        """None where there are no results."""
        return self.cells.get((row, budget))

    def drop(self, row: str, budget: Fraction) -> float | None:
        """Points lost against the dense model."""
        cell = self.cell(row, budget)
        return None if cell is None else 100 * (self.dense - cell.score)


def by_task(records: Iterable[Record]) -> list[TaskFigures]:
    """The records of `results.read`, task by task, in the benchmark's order.

    Raises:
        OptionError: the records of one task were measured on different test examples.
    """
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        grouped[record["task"]].append(record)
    order = {name: i for i, name in enumerate(TASKS)}
    return [_task(grouped[name]) for name in sorted(grouped, key=lambda name: order.get(name, len(order)))]


def as_budget(share: float) -> Fraction:
    """A budget as a small fraction: records hold 0.3333333333333333 for 1/3."""
    return Fraction(share).limit_denominator(100)


def flops_ratios(task: TaskFigures, row: str, budget: Fraction) -> dict[str, float] | None:
    """FLOPs of the dense model, by its padding, over those of a row that runs on real tokens only.

    Real tokens over real tokens is what pruning itself saves; the other two count the padding that is not run as saved,
    too, as papers with models of a fixed length do.
    """
    cell = task.cell(row, budget)
    if cell is None or task.dense_flops is None:
        return None
    pruned = cell.flops * task.dense_flops["real_tokens"]
    return {kind: flops / pruned for kind, flops in task.dense_flops.items()}


def _task(records: list[Record]) -> TaskFigures:
    first = records[0]
    sizes = sorted({record["test_examples"] for record in records})
    if len(sizes) > 1:
        raise OptionError(
            f"The results of {first['task']} were measured on different numbers of test examples "
            f"({', '.join(map(str, sizes))}), so they cannot stand side by side. Remove those of one number and run "
            "their rows again with the same --every."
        )
    return TaskFigures(
        name=first["task"],
        headline=first["headline"],
        long_text=first["long_text"],
        examples=sizes[0],
        dense=fmean(record["dense"][first["headline"]] for record in records),
        dense_flops=next((record["dense_flops"] for record in records if "dense_flops" in record), None),
        cells=_cells(records, first["headline"]),
    )


def _cells(records: list[Record], headline: str) -> dict[tuple[str, Fraction], Cell]:
    found: dict[tuple[str, Fraction], list[Record]] = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            found[row["row"], as_budget(row["budget"])].append(row)
    return {key: _cell(rows, headline) for key, rows in found.items()}


def _cell(rows: list[Record], headline: str) -> Cell:
    scores = [row[headline] for row in rows]
    spread = (max(scores) - min(scores)) / 2
    return Cell(fmean(scores), spread, fmean(row["flops"] for row in rows), len(rows))
