"""Whether row "both" of accuracy answers in OpenVINO as in training, and how fast it is against dense and cut texts."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import prunepass
from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import Array, predict
from benchmarks.accuracy.rows import rounded
from benchmarks.accuracy.tasks import TASKS, find_task
from benchmarks.accuracy.tasks import Task as Dataset
from benchmarks.accuracy.teachers import load_tokenizer
from benchmarks.accuracy.truncation import SHARES, find_cut, flops_of_row
from benchmarks.markdown import settings, table
from benchmarks.places import pruned_folder
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.tasks.accuracy import ROWS, percent
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.training.loop.checkpoint import BUDGETS_FOLDER, NOTES_FILE

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
#: outputs that differ by more are called apart; in float32 the same tokens give the same to about 1e-5
APART = 1e-2
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Deployed: as accurate as in training, and how fast"
    introduction = (
        f'Row "{ROWS["both"]}". Tokens hidden from the attention (float32, eager), as in training, against tokens gone '
        "(OpenVINO, float32). Milliseconds a text are those of OpenVINO in the precision that it chooses, batches of "
        "one text, the mean over a sample of the task's lengths."
    )
    tasks: tuple[str, ...] = option(tuple(TASKS), "which")
    budgets: tuple[Fraction, ...] = option((Fraction(2, 5),), "shares of FLOPs, of those that were trained")
    seed: int = option(0, "which of the trained models")
    every: int | None = option(None, "score only every so many test examples, not as many as the task says", type=int)
    texts: int = option(64, "how many texts to time, of all lengths")
    repeats: int = option(5, "how often to time each")
    threads: int | None = option(None, "of the runtime; its own choice by default", type=int)

    @property
    def config(self) -> dict[str, Any]:
        """As the runtime's settings; precision is left to it."""
        return {} if self.threads is None else {"INFERENCE_NUM_THREADS": self.threads}

    def cells(self) -> Iterator[Cell]:
        for name in self.tasks:
            key = {"task": name, "seed": self.seed}
            yield Cell(key, partial(check, self, find_task(name)), tuple(map(str, self.budgets)))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        agreement, times = [], []
        for shared, row in ((g.shared, r) for g in groups for r in g.rows):
            hidden, gone = (row[way][find_task(shared["task"]).headline] for way in ("masked", "deployed"))
            names = [shared["task"], str(shared["seed"])]
            agreement.append([*names, row["budget"], percent(hidden, 2), percent(gone, 2), f"{row['difference']:+.2f}"])
            dense, cut, both = row["milliseconds"]
            how = [shared["precision"], str(shared["threads"]), row["budget"]]
            times.append([*names, *how, *(f"{t:.2f}" for t in (dense, cut, both)), f"{dense / both:.2f}x"])
        yield table(["task", "seed", "budget", "hidden", "gone", "points"], agreement)
        columns = [
            "task",
            "seed",
            "precision",
            "threads",
            "budget",
            "dense",
            ROWS["truncated"],
            ROWS["both"],
            "speedup",
        ]
        yield f"## Milliseconds a text\n\n{table(columns, times)}"
        yield settings(groups)


def check(options: Benchmark, task: Dataset, budgets: Sequence[str]) -> tuple[dict[str, Any], Rows]:
    """Score and time the model that row "both" of the benchmark accuracy left.

    Rows hold the task's figures with tokens hidden from the attention (``masked``, float32 in eager PyTorch) and gone
    (``deployed``, float32; ``timed``, the runtime's own precision), the ``difference`` of the first two in points, the
    share of rows whose outputs are ``apart``, and ``milliseconds`` a text: dense, cut to ``cut`` tokens, pruned.

    Raises:
        OptionError: there is no such model, or no plan for one of the budgets.
    """
    plans = {budget: PrunePlan.from_pretrained(plan_folder(task, options.seed, Fraction(budget))) for budget in budgets}
    one = _Check(options, task)
    with tempfile.TemporaryDirectory() as folder:
        found = {budget: one.compare(plan, Path(folder, str(i))) for i, (budget, plan) in enumerate(plans.items())}
        dense, times = one.latency([Fraction(b) for b in budgets], Path(folder))
    shared = conditions("openvino", threads=dense.threads) | {
        "test_examples": len(one.features.examples),
        "precision": dense.precision,
        "texts": options.texts,
        "repeats": options.repeats,
    }
    return shared, [{"budget": budget, **found[budget], **times[Fraction(budget)]} for budget in budgets]


def plan_folder(task: Dataset, seed: int, budget: Fraction) -> Path:
    """Where the plan for a budget lies; see `training.loop.checkpoint`. Raises `OptionError` if it does not."""
    home = pruned_folder(task.name, seed)
    if not (home / NOTES_FILE).is_file():
        raise OptionError(
            f"There is no trained model of {task.name} with seed {seed} at {home}. Train it: python -m benchmarks "
            f"accuracy --tasks {task.name} --rows both --again."
        )
    goal = json.loads((home / NOTES_FILE).read_text(encoding="utf-8"))["goal"][0]
    folder = home if goal == float(budget) else home / BUDGETS_FOLDER / f"{float(budget):g}"
    if not (folder / "prunepass.json").is_file():
        raise OptionError(f"There is no plan for {budget} in {home}; there are {', '.join(map(str, SHARES))}.")
    return folder


class _Check:
    def __init__(self, options: Benchmark, task: Dataset) -> None:
        self.options, self.task = options, task
        self.tokenizer = load_tokenizer()
        self.model = task.build_dense(pruned_folder(task.name, options.seed))
        self.features = task.features(task.test(options.every), self.tokenizer)
        rows = [{name: row[name] for name in self.tokenizer.model_input_names} for row in self.features.rows[:2]]
        self.example = dict(self.tokenizer.pad(rows, return_tensors="pt"))

    def compare(self, plan: PrunePlan, folder: Path) -> dict[str, Any]:
        """Hidden, gone, and gone in the runtime's own precision; leaves the exported model in ``folder``."""
        masked = self._outputs(prunepass.prune(self.model, plan, self.example, mode="mask"))
        home = self._export(plan, folder)
        deployed = self._outputs(Exported(home, FLOAT32))
        timed = self._outputs(Exported(home, self.options.config))
        figures = [self.task.metric(outputs, self.features) for outputs in (masked, deployed, timed)]
        headlines = [found[self.task.headline] for found in figures]
        return {
            **{way: rounded(one) for way, one in zip(("masked", "deployed", "timed"), figures, strict=True)},
            "difference": round(100 * (headlines[1] - headlines[0]), 4),
            "apart": round(apart(masked, deployed), 5),
        }

    def latency(self, budgets: Sequence[Fraction], folder: Path) -> tuple[Exported, dict[Fraction, dict[str, Any]]]:
        """Dense, cut and pruned, in turns, in the runtime's own precision; takes what `compare` left."""
        # no plan at all would mean the one in the folder that the model comes from
        dense = Exported(self._export(PrunePlan(()), folder / "dense"), self.options.config)
        few = sample(self.features, self.options.texts)
        uncut = texts_of(self.features, few, self.tokenizer)
        cuts = {budget: self._cut(budget) for budget in budgets}
        ways = [Way(dense, uncut)]
        for i, budget in enumerate(budgets):
            ways.append(Way(dense, texts_of(cuts[budget][1], few, self.tokenizer)))
            ways.append(Way(Exported(folder / str(i), self.options.config), uncut))
        taken = [round(ms, 4) for ms in milliseconds(ways, self.options.repeats)]
        return dense, {
            budget: {"cut": cuts[budget][0], "milliseconds": [taken[0], *taken[2 * i + 1 : 2 * i + 3]]}
            for i, budget in enumerate(budgets)
        }

    def _cut(self, budget: Fraction) -> tuple[int, Features]:
        """The length of row "truncated", and texts cut to it."""
        examples, most = self.features.examples, self.task.max_length
        lengths = self.task.features(examples, self.tokenizer, cut=most).lengths
        flops = flops_of_row(self.model, self.features, self.tokenizer)
        cut = find_cut(self.features.lengths, lengths, flops, budget).length
        return cut, self.task.features(examples, self.tokenizer, cut=cut)

    def _export(self, plan: PrunePlan, folder: Path) -> Path:
        return prunepass.export(self.model, plan, folder, to="openvino", example_inputs=self.example)

    def _outputs(self, model: Any) -> list[Array]:
        return predict(model, self.features, self.task.kind, self.tokenizer)


def apart(some: Sequence[Array], others: Sequence[Array]) -> float:
    """Share of rows whose outputs differ somewhere by more than `APART`."""
    return float(np.mean([np.abs(a - b).max() > APART for a, b in zip(some, others, strict=True)]))


class Exported:
    """A folder that `prunepass.export` wrote, compiled for the CPU; called like the model it came from.

    Args:
        config: the runtime's settings, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from prunepass.backends._openvino_core import core

        self._compiled = core().compile_model(folder / "openvino_model.xml", "CPU", dict(config))
        self._names = [port.get_any_name() for port in self._compiled.inputs]
        self._request = self._compiled.create_infer_request()
        self.precision = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def __call__(self, **inputs: Tensor) -> dict[str, Any]:
        """Named outputs as arrays, of inputs int64 [batch, length]."""
        found = self._request.infer({name: inputs[name].numpy() for name in self._names}, share_inputs=True)
        return {port.get_any_name(): found[port] for port in self._compiled.outputs}


@dataclass(frozen=True)
class Way:
    """A model and the texts it reads: of each text its rows, which run one by one; a long text may have several."""

    model: Callable[..., Any]
    texts: Sequence[Sequence[Inputs]]


def milliseconds(ways: Sequence[Way], repeats: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Of each way a text: the mean over the texts of each text's median over the repeats.

    All ways take the same text in turns before the next text comes, and who goes first changes, so that a machine that
    is busy now and then slows all of them alike. A first round, which is not counted, warms up.
    """
    times: list[list[list[float]]] = [[[] for _ in way.texts] for way in ways]
    for repeat in range(repeats + 1):
        for text in range(len(ways[0].texts)):
            for step in range(len(ways)):
                which = (step + repeat + text) % len(ways)
                started = clock()
                for row in ways[which].texts[text]:
                    ways[which].model(**row)
                if repeat:
                    times[which][text].append(1000 * (clock() - started))
    return [statistics.fmean(statistics.median(found) for found in by_text) for by_text in times]


def sample(features: Features, count: int) -> list[int]:
    """Indices of ``count`` examples (all, where there are fewer) that stand for the lengths of all: evenly spaced in
    the order of length."""
    tokens = [0] * len(features.examples)
    for owner, length in zip(features.owners, features.lengths, strict=True):
        tokens[owner] += length
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    count = min(count, len(order))
    return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def texts_of(features: Features, few: Sequence[int], tokenizer: Any) -> list[list[Inputs]]:
    """The rows of a few examples as inputs of shape [1, length]."""
    rows: dict[int, list[Inputs]] = {example: [] for example in few}
    for owner, row in zip(features.owners, features.rows, strict=True):
        if owner in rows:
            one = [{name: row[name] for name in tokenizer.model_input_names}]
            rows[owner].append(dict(tokenizer.pad(one, return_tensors="pt")))
    return [rows[example] for example in few]
