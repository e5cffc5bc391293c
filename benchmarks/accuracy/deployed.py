"""Row "both" as it is deployed, exported to OpenVINO: whether it answers as in training, and how fast it is."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import prunepass
from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import Array
from benchmarks.accuracy.places import pruned_folder
from benchmarks.accuracy.predict import predict
from benchmarks.accuracy.rows import BUDGETS
from benchmarks.accuracy.runtime import Exported, Way, milliseconds, sample, texts_of
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.teachers import load_tokenizer
from benchmarks.accuracy.truncation import find_cut, flops_of_row
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.training.loop.checkpoint import BUDGETS_FOLDER, NOTES_FILE

__all__ = ["Timing", "check"]

PACKAGES = ("torch", "transformers", "openvino", "prunepass")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
#: outputs that differ by more are called apart; in float32 the same tokens give the same to about 1e-5
APART = 1e-2


@dataclass(frozen=True)
class Timing:
    """How latency is measured.

    Attributes:
        texts: how many, of all lengths.
        repeats: of each text.
        threads: for the runtime to compute with; its own choice where None.
    """

    texts: int = 64
    repeats: int = 5
    threads: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """As the runtime's settings; precision is left to it."""
        return {} if self.threads is None else {"INFERENCE_NUM_THREADS": self.threads}


def check(
    task: Task, seed: int, budgets: Sequence[Fraction], every: int | None = None, timing: Timing | None = None
) -> dict[str, Any]:
    """Score and time the model that row "both" of the command ``run`` left.

    Args:
        every: score only every so many test examples; the task's own default where left out.

    Returns:
        the record for `results.write_deployed`. ``budgets`` holds the task's figures with tokens hidden from the
        attention (``masked``, float32 in eager PyTorch) and gone (``deployed``, float32; ``timed``, the runtime's own
        precision), the ``difference`` of the first two in points, and the share of rows whose outputs are ``apart``.

    Raises:
        OptionError: there is no such model, or no plan for one of the budgets.
    """
    folders = {budget: plan_folder(task, seed, budget) for budget in budgets}
    one = _Check(task, seed, task.test(every), timing or Timing())
    with tempfile.TemporaryDirectory() as folder:
        found = [one.compare(budget, PrunePlan.from_pretrained(folders[budget]), Path(folder)) for budget in budgets]
        latency = one.latency(budgets, Path(folder))
    return {
        "task": task.name,
        "headline": task.headline,
        "long_text": task.long_text,
        "seed": seed,
        "test_examples": len(one.features.examples),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "budgets": found,
        "latency": latency,
    }


def plan_folder(task: Task, seed: int, budget: Fraction) -> Path:
    """Where the plan for a budget lies; see `training.loop.checkpoint`. Raises `OptionError` if it does not."""
    home = pruned_folder(task.name, seed)
    if not (home / NOTES_FILE).is_file():
        raise OptionError(
            f"There is no trained model of {task.name} with seed {seed} at {home}. Remove that row's results, if there "
            f"are any, and train it: run {task.name} --rows both."
        )
    goal = json.loads((home / NOTES_FILE).read_text(encoding="utf-8"))["goal"][0]
    folder = home if goal == float(budget) else home / BUDGETS_FOLDER / f"{float(budget):g}"
    if not (folder / "prunepass.json").is_file():
        raise OptionError(f"There is no plan for {budget} in {home}; there are {', '.join(map(str, BUDGETS))}.")
    return folder


class _Check:
    def __init__(self, task: Task, seed: int, examples: Sequence[Any], timing: Timing) -> None:
        self.task, self.timing = task, timing
        self.tokenizer = load_tokenizer()
        self.model = task.build_dense(pruned_folder(task.name, seed))
        self.features = task.features(examples, self.tokenizer)
        rows = [{name: row[name] for name in self.tokenizer.model_input_names} for row in self.features.rows[:2]]
        self.example = dict(self.tokenizer.pad(rows, return_tensors="pt"))

    def compare(self, budget: Fraction, plan: PrunePlan, folder: Path) -> dict[str, Any]:
        """Hidden, gone, and gone in the runtime's own precision; leaves the exported model in ``folder``."""
        masked = self._outputs(prunepass.prune(self.model, plan, self.example, mode="mask"))
        home = self._export(plan, folder / _name(budget))
        deployed = self._outputs(Exported(home, FLOAT32))
        timed = self._outputs(Exported(home, self.timing.config))
        figures = [self.task.metric(outputs, self.features) for outputs in (masked, deployed, timed)]
        headlines = [found[self.task.headline] for found in figures]
        return {
            "budget": float(budget),
            **dict(zip(("masked", "deployed", "timed"), figures, strict=True)),
            "difference": round(100 * (headlines[1] - headlines[0]), 4),
            "apart": round(_apart(masked, deployed), 5),
        }

    def latency(self, budgets: Sequence[Fraction], folder: Path) -> dict[str, Any]:
        """Dense, cut and pruned, in turns, in the runtime's own precision; takes what `compare` left."""
        dense = Exported(self._export(None, folder / "dense"), self.timing.config)
        chosen = sample(self.features, self.timing.texts)
        uncut = texts_of(self.features, chosen, self.tokenizer)
        ways = [Way("dense", 1.0, dense, uncut)]
        for budget in budgets:
            length, features = self._cut(budget)
            ways.append(Way("truncated", float(budget), dense, texts_of(features, chosen, self.tokenizer), cut=length))
            pruned = Exported(folder / _name(budget), self.timing.config)
            ways.append(Way("both", float(budget), pruned, uncut))
        return {
            "precision": dense.precision,
            "threads": dense.threads,
            "texts": len(chosen),
            "repeats": self.timing.repeats,
            "ways": [_way(way, taken) for way, taken in milliseconds(ways, self.timing.repeats)],
        }

    def _cut(self, budget: Fraction) -> tuple[int, Features]:
        """The length of row "truncated", and texts cut to it."""
        examples, most = self.features.examples, self.task.max_length
        lengths = self.task.features(examples, self.tokenizer, cut=most).lengths
        flops = flops_of_row(self.model, self.features, self.tokenizer)
        cut = find_cut(self.features.lengths, lengths, flops, budget).length
        return cut, self.task.features(examples, self.tokenizer, cut=cut)

    def _export(self, plan: PrunePlan | None, folder: Path) -> Path:
        return prunepass.export(self.model, plan, folder, to="openvino", example_inputs=self.example)

    def _outputs(self, model: Any) -> list[Array]:
        return predict(model, self.features, self.task.kind, self.tokenizer)


def _apart(some: Sequence[Array], others: Sequence[Array]) -> float:
    """Share of rows whose outputs differ somewhere by more than `APART`."""
    return float(np.mean([np.abs(a - b).max() > APART for a, b in zip(some, others, strict=True)]))


def _way(way: Way, taken: float) -> Mapping[str, Any]:
    found = {"row": way.row, "budget": way.budget, "milliseconds": round(taken, 4)}
    return found if way.cut is None else found | {"cut": way.cut}


def _name(budget: Fraction) -> str:
    return f"{budget.numerator}-{budget.denominator}"
