"""What pruning costs in accuracy on tasks of several kinds: every way to spend fewer FLOPs, against the dense model.

Dense models come from the task teachers; data sets are read from the folder that PRUNEPASS_DATA names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from benchmarks.accuracy.rows import KNOWN, Run, rounded, rows_of
from benchmarks.accuracy.tasks import MINILM, TASKS, find_task
from benchmarks.accuracy.teachers import model_folder
from benchmarks.accuracy.truncation import MAIN_BUDGET, SHARES
from benchmarks.markdown import settings, spread, table
from benchmarks.places import pruned_folder
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.training import bf16_pays
from prunepass.errors import OptionError

#: what tables call the rows, in their order
ROWS = {
    "truncated": "text cut short",
    "random": "random",
    "attention": "attention, training-free",
    "search": "trained predictors, frozen model",
    "top": "ToP",
    "sdtp": "SDTP",
    "both": "both together",
}
#: relative difference from the budget above which a cell says its real share
NEAR = 0.02
#: rows that must be better than all of `BASELINES` on long texts
CONTENDERS, BASELINES = ("search", "both"), ("truncated", "random", "attention")
DENOMINATORS = {
    "padded_to_max": "padded to the maximum",
    "padded_to_batch": "padded to the batch",
    "real_tokens": "real tokens",
}


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What pruning costs in accuracy"
    introduction = (
        "Figures are in %. Columns are budgets: FLOPs kept, counted on real tokens (no padding), scoring "
        'included. "@" is the share really kept, where it differs from the budget by more than 2 %. With several '
        "seeds a cell is their mean, ± half the way from the worst to the best. **Bold** is better than the text "
        "cut short to as many FLOPs. Empty cells were not measured, or cannot be: attention is known only after "
        "the first of six blocks, too late for 1/8."
    )
    tasks: tuple[str, ...] = option(tuple(TASKS), "which")
    rows: tuple[str, ...] = option(("free", "both"), f"of: {', '.join(KNOWN)}; free is random and attention")
    seeds: int = option(1, "how many, from 0")
    every: int | None = option(None, "score only every so many test examples, not as many as the task says", type=int)

    def cells(self) -> Iterator[Cell]:
        for row in self.rows:
            chosen(row, KNOWN, "row")
        for name in self.tasks:
            missing = not model_folder(find_task(name)).is_dir()
            why_not = "its dense model is missing; run the benchmark teachers first" if missing else None
            for seed in range(self.seeds):
                runner = cache(lambda name=name, seed=seed: Run(find_task(name), seed, self.every))
                for row in self.rows:
                    key = {"task": name, "run": row, "seed": seed}
                    yield Cell(key, partial(_measure, runner, row), why_not=why_not)

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        tasks = by_task(groups)
        yield from map(_of_task, tasks)
        yield _drops(tasks)
        yield _contest(tasks)
        yield _denominators(tasks)
        yield settings(groups)


def _measure(runner: Any, row: str, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
    run: Run = runner()
    shared = {
        "dense": rounded(run.dense_score),
        "dense_flops": run.dense_flops(),
        "test_examples": len(run.test.examples),
        "precision": "bf16 autocast" if bf16_pays() else "f32",
        **conditions("accelerate", threads=torch.get_num_threads()),
    }
    return shared, rows_of(run, row, pruned_folder(run.task.name, run.seed) if row == "both" else None)


# -- rows of a task --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Everything that is known of a task: its dense figure, and rows by name and budget, one a seed.

    Attributes:
        dense_flops: the dense model's FLOPs by kind of padding (`prunepass.cost.CorpusFlops`).
    """

    name: str
    examples: int
    dense: float
    dense_flops: Mapping[str, int] | None
    rows: Mapping[tuple[str, Fraction], Sequence[Mapping[str, Any]]]

    @property
    def headline(self) -> str:
        return find_task(self.name).headline

    def scores(self, row: str, budget: Fraction) -> list[float]:
        """The headline figure in [0, 1], by seed; empty where there are no rows."""
        return [found[self.headline] for found in self.rows.get((row, budget), ())]

    def score(self, row: str, budget: Fraction) -> float | None:
        """The mean over the seeds."""
        return fmean(found) if (found := self.scores(row, budget)) else None

    def flops(self, row: str, budget: Fraction) -> float:
        """Real FLOPs on real tokens as a share of the dense model's; the mean over the seeds."""
        return fmean(found["flops"] for found in self.rows[row, budget])

    def ratios(self, row: str, budget: Fraction) -> dict[str, float] | None:
        """FLOPs of the dense model, by its padding, over those of a row that runs on real tokens only.

        Real tokens over real tokens is what pruning itself saves; the other two count the padding that is not run as
        saved, too, as papers with models of a fixed length do.
        """
        if self.dense_flops is None or (row, budget) not in self.rows:
            return None
        pruned = self.flops(row, budget) * self.dense_flops["real_tokens"]
        return {kind: flops / pruned for kind, flops in self.dense_flops.items()}


def by_task(groups: Sequence[Group]) -> list[Figures]:
    """Task by task, in the benchmark's order.

    Raises:
        OptionError: the rows of one task were measured on different test examples.
    """
    return [_figures(name, mine) for name in TASKS if (mine := [g for g in groups if g.shared["task"] == name])]


def _figures(name: str, groups: Sequence[Group]) -> Figures:
    sizes = sorted({group.shared["test_examples"] for group in groups})
    if len(sizes) > 1:
        raise OptionError(
            f"The results of {name} are of different numbers of test examples ({', '.join(map(str, sizes))}): "
            "they cannot stand side by side. Run those of one number again with the same --every."
        )
    rows: dict[tuple[str, Fraction], list[Mapping[str, Any]]] = defaultdict(list)
    for group in groups:
        for row in group.rows:
            rows[row["row"], Fraction(row["budget"])].append(row)
    dense = fmean(group.shared["dense"][find_task(name).headline] for group in groups)
    flops = next((group.shared["dense_flops"] for group in groups if "dense_flops" in group.shared), None)
    return Figures(name, sizes[0], dense, flops, dict(rows))


# -- page ------------------------------------------------------------------------------------------------------------


def _of_task(task: Figures) -> str:
    kind = ", long texts" if find_task(task.name).long_text else ""
    if find_task(task.name).base != MINILM:
        kind += ", Gemma 3 270M (18 layers)"
    head = f"## {task.name}\n\n{task.headline} on {task.examples} test examples{kind}.\n\n"
    lines = [["dense", percent(task.dense), *[""] * len(SHARES)]]
    for row, label in ROWS.items():
        lines.append([label, "", *(_text(task, row, share) for share in SHARES)])
    return head + table(["", "1", *map(str, SHARES)], lines)


def _text(task: Figures, row: str, budget: Fraction) -> str:
    score, cut = task.score(row, budget), task.score("truncated", budget)
    if score is None:
        return ""
    text = spread([100 * one for one in task.scores(row, budget)], 1)
    if cut is not None and score > cut:
        text = f"**{text}**"
    flops = task.flops(row, budget)
    return text if abs(flops / budget - 1) <= NEAR else f"{text} @{flops:.3f}"


def _drops(tasks: Sequence[Figures]) -> str:
    lines = []
    for row, label in ROWS.items():
        small = (task for task in tasks if find_task(task.name).base == MINILM)
        found = {t.name: 100 * (t.dense - s) for t in small if (s := t.score(row, MAIN_BUDGET)) is not None}
        if found:
            worst = max(found, key=found.__getitem__)
            lines.append([label, f"{fmean(found.values()):.2f}", f"{found[worst]:.2f} ({worst})", str(len(found))])
    words = "Against the dense model of six layers, over the tasks measured."
    head = f"## Points lost at {MAIN_BUDGET} of the FLOPs\n\n{words}\n\n"
    return head + table(["", "mean", "most", "tasks"], lines) if lines else ""


def _contest(tasks: Sequence[Figures]) -> str:
    lines = [
        [task.name, ROWS[row], *(_above(task, row, baseline) for baseline in BASELINES)]
        for task in tasks
        for row in CONTENDERS
        if find_task(task.name).long_text and any(task.scores(row, share) for share in SHARES)
    ]
    head = "## Long texts: better at every budget than\n\nBrackets hold the budgets at which it is not.\n\n"
    return head + table(["task", "row", *(ROWS[b] for b in BASELINES)], lines) if lines else ""


def _above(task: Figures, row: str, baseline: str) -> str:
    """Whether a row beats a baseline wherever both were measured."""
    pairs = {share: (task.score(row, share), task.score(baseline, share)) for share in SHARES}
    measured = {
        share: (mine, other) for share, (mine, other) in pairs.items() if mine is not None and other is not None
    }
    lost = [str(share) for share, (mine, other) in measured.items() if mine <= other]
    if not measured:
        return ""
    return f"no ({', '.join(lost)})" if lost else "yes"


def _denominators(tasks: Sequence[Figures]) -> str:
    ratios = {task.name: task.ratios("both", MAIN_BUDGET) for task in tasks}
    lines = [[name, *(f"{found[k]:.2f}x" for k in DENOMINATORS)] for name, found in ratios.items() if found]
    head = (
        f'## Times fewer FLOPs than the dense model: "{ROWS["both"]}" at {MAIN_BUDGET}\n\n'
        "The pruned model runs on real tokens; columns say how the dense one is padded (batches of 32 in the data's "
        "order).\n\n"
    )
    return head + table(["task", *DENOMINATORS.values()], lines) if lines else ""


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"
