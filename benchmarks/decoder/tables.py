"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.decoder import results
from benchmarks.decoder.predictors import TRAINED
from benchmarks.decoder.recall_table import recall_part
from benchmarks.decoder.rows import ROWS
from benchmarks.decoder.speed_table import speed_part
from benchmarks.records import table
from prunepass.errors import OptionError

__all__ = ["BASELINES", "markdown", "write"]

#: rows that the trained predictors must be better than
BASELINES = ("random", "recency", "norm", "last-row")
BOUND = "oracle"
#: figure -> (heading, whether more is better, factor, digits)
FIGURES = {
    "perplexity": ("Perplexity of the text after the prompt", False, 1, 3),
    "agreement": ("Agreement with the full model's greedy continuation, %", True, 100, 2),
}

INTRODUCTION = """\
# What pruning the prompt costs a causal model

Made from the JSON files of this folder by `python -m benchmarks.decoder table`; do not edit.

Columns are budgets: FLOPs of the prefill as a share of the dense one's, scoring included, counted on the graph that
ran. All rows have stages before each block but the first and keep the first four tokens and the last tenth of the
prompt. The oracle knows how the text goes on: its scores are the saliency that the predictors learn, whose computing is
not counted. A cell is the mean over the seeds, ± half the way from the lowest to the highest, most of which comes from
which prompts were drawn; the second tables compare rows on the same prompts."""


def write(folder: Path = results.FOLDER) -> Path:
    """Write ``table.md``; gives its path.

    Raises:
        OptionError: there are no results.
    """
    records = list(results.read(folder))
    if not any("rows" in record for record in records):
        raise OptionError(f"There are no results in {folder}; make some with the command stories.")
    path = folder / "table.md"
    path.write_text(markdown(records), encoding="utf-8")
    return path


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """The whole page, of records that `results.read` gave."""
    records = list(records)
    parts = [part for record in records if "rows" in record for part in _of_model(record)]
    parts += [_of_caches(record) for record in records if "cache" in record]
    parts += [speed_part(record) for record in records if "speed" in record]
    return "\n\n".join([INTRODUCTION, *parts, *(recall_part(r) for r in records if "recall" in r)]) + "\n"


def _of_model(record: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"## {record['model']}\n\nPrompts of {record['prompt']} tokens, {record['continuation']} tokens after them, "
        f"{record['prompts']} prompts with each of {len(_seeds(record))} seeds. "
        f"FLOPs are within {_furthest(record):.2%} of the column."
    )
    for figure, (heading, *_) in FIGURES.items():
        yield f"### {heading}\n\n{_figure(record, figure)}\n\n{_contest(record, figure)}"


def _of_caches(record: Mapping[str, Any]) -> str:
    """A line for each way to prune the prompt and each share of the cache that is kept after it."""
    lines = []
    for row, keep in dict.fromkeys((found["row"], found["keep"]) for found in record["cache"]):
        of = [found for found in record["cache"] if (found["row"], found["keep"]) == (row, keep)]
        shown = [_spread([f * found[name] for found in of], digits) for name, (*_, f, digits) in FIGURES.items()]
        held = f"{100 * fmean(found['held'] for found in of):.0f}"
        lines.append(["not pruned" if row == "full" else ROWS[row], f"{keep:g}", held, *shown])
    head = (
        f"## {record['model']}: the cache cut after the prompt\n\nThe same prompts, pruned to "
        f"{record['training']['budget']:g} of the FLOPs or not; then each layer but the first keeps a share of its "
        f"cache by what the last {record['window']} tokens attend to (`prunepass.compress_cache`)."
    )
    columns = ("the prompt", "kept after it", "of the dense cache, %", "perplexity", "agreement, %")
    return f"{head}\n\n{table(columns, lines)}"


def _figure(record: Mapping[str, Any], figure: str) -> str:
    budgets = _budgets(record)
    _, _, factor, digits = FIGURES[figure]
    full = [factor * row[figure] for row in record["rows"] if row["row"] == "full"]
    lines = [["full model", _spread(full, digits), *[""] * len(budgets)]]
    for row, label in ROWS.items():
        cells = [list(_values(record, row, budget, figure).values()) for budget in budgets]
        lines.append([label, "", *(_spread([factor * v for v in cell], digits) for cell in cells)])
    for trained in _trained(record):
        gaps = [_gap(record, trained, budget, figure) for budget in budgets]
        lines.append(
            [f"from {ROWS[trained]} to the oracle", "", *(_spread([factor * g for g in gap], digits) for gap in gaps)]
        )
    return table(["", "1", *(f"{budget:g}" for budget in budgets)], lines)


def _trained(record: Mapping[str, Any]) -> list[str]:
    """The record's rows of trained predictors."""
    there = {row["row"] for row in record["rows"]}
    return [row for row in TRAINED if row in there]


def _gap(record: Mapping[str, Any], trained: str, budget: float, figure: str) -> list[float]:
    """How much worse trained predictors are than the oracle, by seed."""
    bound = _values(record, BOUND, budget, figure)
    sign = 1 if FIGURES[figure][1] else -1
    return [sign * (bound[seed] - value) for seed, value in _values(record, trained, budget, figure).items()]


def _contest(record: Mapping[str, Any], figure: str) -> str:
    """On how many seeds the trained predictors are better than each baseline."""
    budgets = _budgets(record)
    lines = [
        [f"{ROWS[trained]}, than {ROWS[row]}", *(_wins(record, trained, row, budget, figure) for budget in budgets)]
        for trained in _trained(record)
        for row in BASELINES
    ]
    return table(["better (seeds of all)", *(f"{b:g}" for b in budgets)], lines)


def _wins(record: Mapping[str, Any], trained: str, row: str, budget: float, figure: str) -> str:
    mine, other = (_values(record, name, budget, figure) for name in (trained, row))
    sign = 1 if FIGURES[figure][1] else -1
    wins = sum(sign * (mine[seed] - other[seed]) > 0 for seed in mine)
    mean = sign * (fmean(mine.values()) - fmean(other.values()))
    return f"{wins} of {len(mine)}" + ("" if mean > 0 else ", worse in the mean")


def _values(record: Mapping[str, Any], row: str, budget: float, figure: str) -> dict[int, float]:
    """By seed."""
    return {
        found["seed"]: found[figure] for found in record["rows"] if (found["row"], found["budget"]) == (row, budget)
    }


def _budgets(record: Mapping[str, Any]) -> list[float]:
    return sorted({row["budget"] for row in record["rows"] if row["row"] != "full"}, reverse=True)


def _seeds(record: Mapping[str, Any]) -> set[int]:
    return {row["seed"] for row in record["rows"]}


def _furthest(record: Mapping[str, Any]) -> float:
    """The largest relative difference of a row's FLOPs from its budget."""
    differences: list[float] = [abs(row["flops"] / row["budget"] - 1) for row in record["rows"]]
    return max(differences)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"
