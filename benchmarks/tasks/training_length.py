"""How accuracy changes with the length of training: several numbers of epochs, scored on validation rows.

Dense models come from the task teachers; data sets are read from the folder that PRUNEPASS_DATA names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.accuracy.rows import RECIPES, SEARCHED, TRAINED, Run, rounded
from benchmarks.accuracy.tasks import find_task
from benchmarks.accuracy.teachers import model_folder
from benchmarks.markdown import settings, spread, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.training import bf16_pays

PICTURE = "training-length.svg"


@dataclass(frozen=True)
class Benchmark(Task):
    title = "How long to train"
    introduction = (
        "Each line is a training of its own, with its own search for layers and shares, and a learning rate that falls "
        "to zero at its end. All budgets are learned together. Figures are in %, on rows that neither the dense model "
        "nor the pruned one was trained on. Recipes were chosen by such rows, so these are no test figures. "
        "*Predictors alone* is the same run before the model adapts. Steps are all steps of training, those that rank "
        "tokens among them."
    )
    tasks: tuple[str, ...] = option(("stsb",), "which")
    methods: tuple[str, ...] = option(("both",), f"of: {', '.join(TRAINED)}")
    epochs: tuple[float, ...] = option((1.0, 2.0, 4.0, 8.0), "passes over the task's own examples")
    seeds: int = option(1, "how many, from 0")

    def cells(self) -> Iterator[Cell]:
        for method in self.methods:
            chosen(method, TRAINED, "method")
        for name in self.tasks:
            missing = not model_folder(find_task(name)).is_dir()
            why_not = "its dense model is missing; run the benchmark teachers first" if missing else None
            for seed in range(self.seeds):
                runner = cache(lambda name=name, seed=seed: Run(find_task(name), seed, validates=True))
                for method in self.methods:
                    for epochs in self.epochs:
                        key = {"task": name, "method": method, "epochs": epochs, "seed": seed}
                        yield Cell(key, partial(_measure, runner, method, epochs), why_not=why_not)

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for (name, method), lengths in by_run(groups).items():
            (first, *_), *_ = lengths.values()
            yield f"## {name}, `{method}`: {find_task(name).headline} on {first.shared['validation_examples']:,} rows"
            budgets = [row["budget"] for row in first.rows if row["row"] == method]
            head = [f"{budget}: {what}" for budget in budgets for what in ("predictors alone", f"`{method}`")]
            columns = [(row, budget) for budget in budgets for row in (SEARCHED, method)]
            lines = [
                [f"{epochs:g}", f"{steps(of):,}", *(spread(points(of, *column), 1) for column in columns)]
                for epochs, of in lengths.items()
            ]
            dense = 100 * first.shared["dense"][find_task(name).headline]
            yield f"Dense {dense:.1f}.\n\n{table(['epochs', 'steps', *head], lines)}"
        yield f"![The same as a chart over the steps]({PICTURE})"
        yield settings(groups)

    @classmethod
    def pictures(cls, groups: Sequence[Group]) -> Mapping[str, Callable[[Path], None]]:
        return {PICTURE: lambda file: draw(groups, file)}


def _measure(runner: Any, method: str, epochs: float, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
    run: Run = runner()
    shared = {
        "dense": rounded(run.dense_score),
        "validation_examples": len(run.test.examples),
        "precision": "bf16 autocast" if bf16_pays() else "f32",
        **conditions("accelerate", threads=torch.get_num_threads()),
    }
    return shared, run.trained(method, replace(RECIPES[run.task.name], epochs=epochs))


def by_run(groups: Sequence[Group]) -> dict[tuple[str, str], dict[float, list[Group]]]:
    """By task and method, and then by epochs in rising order: one group a seed."""
    found: dict[tuple[str, str], dict[float, list[Group]]] = defaultdict(dict)
    for group in sorted(groups, key=lambda group: group.shared["epochs"]):
        run = found[group.shared["task"], group.shared["method"]]
        run.setdefault(group.shared["epochs"], []).append(group)
    return found


def steps(groups: Sequence[Group]) -> int:
    """Of training."""
    return next(int(row["training"]["steps"]) for group in groups for row in group.rows if "training" in row)


def points(groups: Sequence[Group], row: str, budget: str) -> list[float]:
    """The headline figure in %, by seed; empty where there is no such row."""
    return [
        100 * found[find_task(group.shared["task"]).headline]
        for group in groups
        for found in group.rows
        if (found["row"], found["budget"]) == (row, budget)
    ]


def draw(groups: Sequence[Group], file: Path) -> None:
    """A panel for each task and method: the figure over the steps, a line a budget, and the dense model's."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "prunepass", "svg.fonttype": "none"})  # the same file each time, and small
    import matplotlib.pyplot as plt

    runs = by_run(groups)
    figure, panels = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.4), layout="constrained", squeeze=False)
    for panel, ((name, method), lengths) in zip(panels[0], runs.items(), strict=True):
        (first, *_), *_ = lengths.values()
        where = [steps(of) for of in lengths.values()]
        for budget in [row["budget"] for row in first.rows if row["row"] == method]:
            line = [fmean(points(of, method, budget)) for of in lengths.values()]
            panel.plot(where, line, marker="o", markersize=4, label=f"{budget} of the FLOPs")
        panel.axhline(100 * first.shared["dense"][find_task(name).headline], color="0.5", linestyle="--", label="dense")
        panel.set_xscale("log")
        panel.set_xticks(where, [f"{at:,}" for at in where])
        panel.minorticks_off()
        panel.set_title(f"{name}, {method}", fontsize=10)
        panel.set_xlabel("steps of training")
        panel.set_ylabel(f"{find_task(name).headline}, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
