"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from benchmarks.accuracy.cells import ROWS, Cell, TaskFigures, as_budget, flops_ratios
from benchmarks.accuracy.truncation import MAIN_BUDGET, SHARES
from benchmarks.records import table

__all__ = ["markdown"]

#: relative difference from the budget above which a cell says its real share
NEAR = 0.02
#: rows that must be better than all of `BASELINES` on long texts
CONTENDERS = ("search", "both")
BASELINES = ("truncated", "random", "attention")
DENOMINATORS = {
    "padded_to_max": "padded to the maximum",
    "padded_to_batch": "padded to the batch",
    "real_tokens": "real tokens",
}

INTRODUCTION = """\
# What pruning costs in accuracy

Made from the JSON files of this folder by `python -m benchmarks.accuracy plot`; do not edit.

Figures are in %. Columns are budgets: FLOPs kept, counted on real tokens (no padding), scoring included. "@" is the
share really kept, where it differs from the budget by more than 2 %. With several seeds a cell is their mean, ± half
the way from the worst to the best. **Bold** is better than the text cut short to as many FLOPs. Empty cells were not
measured, or cannot be: attention is known only after the first of six blocks, too late for 1/8."""


def markdown(tasks: Sequence[TaskFigures], deployed: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page.

    Args:
        deployed: records of the command ``deployed``.
    """
    parts = [INTRODUCTION, *map(_of_task, tasks), _drops(tasks), _contest(tasks), _denominators(tasks)]
    if deployed:
        parts += [_agreement(deployed), _latency(deployed)]
    return "\n\n".join(part for part in parts if part) + "\n"


# -- one task --------------------------------------------------------------------------------------------------------


def _of_task(task: TaskFigures) -> str:
    kind = ", long texts" if task.long_text else ""
    head = f"## {task.name}\n\n{task.headline} on {task.examples} test examples{kind}.\n\n"
    lines = [["dense", _percent(task.dense), *[""] * len(SHARES)]]
    for row, label in ROWS.items():
        lines.append([label, "", *(_text(task, row, share) for share in SHARES)])
    return head + table(["", "1", *map(str, SHARES)], lines)


def _text(task: TaskFigures, row: str, budget: Fraction) -> str:
    cell = task.cell(row, budget)
    if cell is None:
        return ""
    text = _percent(cell.score)
    if cell.seeds > 1:
        text += f" ± {_percent(cell.spread)}"
    cut = task.cell("truncated", budget)
    if cut is not None and cell.score > cut.score:
        text = f"**{text}**"
    return text if abs(cell.flops / budget - 1) <= NEAR else f"{text} @{cell.flops:.3f}"


# -- over the tasks --------------------------------------------------------------------------------------------------


def _drops(tasks: Sequence[TaskFigures]) -> str:
    lines = []
    for row, label in ROWS.items():
        found = {task.name: drop for task in tasks if (drop := task.drop(row, MAIN_BUDGET)) is not None}
        if found:
            worst = max(found, key=found.__getitem__)
            lines.append([label, f"{fmean(found.values()):.2f}", f"{found[worst]:.2f} ({worst})", str(len(found))])
    head = f"## Points lost at {MAIN_BUDGET} of the FLOPs\n\nAgainst the dense model, over the tasks measured.\n\n"
    return head + table(["", "mean", "most", "tasks"], lines) if lines else ""


def _contest(tasks: Sequence[TaskFigures]) -> str:
    long_texts = [task for task in tasks if task.long_text]
    lines = [
        [task.name, ROWS[row], *(_above(task, row, baseline) for baseline in BASELINES)]
        for task in long_texts
        for row in CONTENDERS
        if any(task.cell(row, share) for share in SHARES)
    ]
    head = "## Long texts: better at every budget than\n\nBrackets hold the budgets at which it is not.\n\n"
    return head + table(["task", "row", *(ROWS[b] for b in BASELINES)], lines) if lines else ""


def _above(task: TaskFigures, row: str, baseline: str) -> str:
    """Whether a row beats a baseline wherever both were measured."""
    pairs = [(share, task.cell(row, share), task.cell(baseline, share)) for share in SHARES]
    measured = [(share, mine, other) for share, mine, other in pairs if mine and other]
    lost = [str(share) for share, mine, other in measured if not _better(mine, other)]
    if not measured:
        return ""
    return f"no ({', '.join(lost)})" if lost else "yes"


def _better(mine: Cell, other: Cell) -> bool:
    return mine.score > other.score


def _denominators(tasks: Sequence[TaskFigures]) -> str:
    ratios = {task.name: flops_ratios(task, "both", MAIN_BUDGET) for task in tasks}
    lines = [[name, *(f"{found[k]:.2f}x" for k in DENOMINATORS)] for name, found in ratios.items() if found]
    head = (
        f'## Times fewer FLOPs than the dense model: "{ROWS["both"]}" at {MAIN_BUDGET}\n\n'
        "The pruned model runs on real tokens; columns say how the dense one is padded (batches of 32 in the data's "
        "order).\n\n"
    )
    return head + table(["task", *DENOMINATORS.values()], lines) if lines else ""


# -- deployed --------------------------------------------------------------------------------------------------------


def _agreement(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            record["task"],
            str(record["seed"]),
            str(as_budget(found["budget"])),
            _percent(found["masked"][record["headline"]], 2),
            _percent(found["deployed"][record["headline"]], 2),
            f"{found['difference']:+.2f}",
        ]
        for record in records
        for found in record["budgets"]
    ]
    head = (
        f'## Deployed: "{ROWS["both"]}"\n\nTokens hidden from the attention (float32, eager), as in training, against '
        "tokens gone (OpenVINO, float32).\n\n"
    )
    return head + table(["task", "seed", "budget", "hidden", "gone", "points"], lines)


def _latency(records: Sequence[Mapping[str, Any]]) -> str:
    head = "## Milliseconds a text\n\nOpenVINO, batches of one text, the mean over a sample of the task's lengths.\n\n"
    names = ["task", "seed", "precision", "threads", "budget", "dense", ROWS["truncated"], ROWS["both"], "speedup"]
    return head + table(names, [line for record in records for line in _latencies(record)])


def _latencies(record: Mapping[str, Any]) -> Iterator[list[str]]:
    found = record["latency"]
    times = {(way["row"], as_budget(way["budget"])): way["milliseconds"] for way in found["ways"]}
    dense = times["dense", Fraction(1)]
    for budget in sorted((b for row, b in times if row == "both"), reverse=True):
        cut, both = times["truncated", budget], times["both", budget]
        fixed = [record["task"], str(record["seed"]), found["precision"], str(found["threads"]), str(budget)]
        yield [*fixed, f"{dense:.2f}", f"{cut:.2f}", f"{both:.2f}", f"{dense / both:.2f}x"]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"
