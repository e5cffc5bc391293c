"""Running rows and keeping what they gave: one JSON file a task, row and seed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.places import pruned_folder
from benchmarks.accuracy.rows import RECIPES, TRAINED, Run, train_free
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.teachers import model_folder
from benchmarks.accuracy.truncation import truncation
from benchmarks.records import write
from prunepass.errors import OptionError

__all__ = ["FOLDER", "read", "read_deployed", "run", "write_deployed"]

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1] / "results" / "accuracy"
PACKAGES = ("torch", "transformers", "accelerate", "prunepass")
DEPLOYED = "*.deployed.*.json"
KNOWN = ("free", "truncated", *TRAINED)


def run(task: Task, rows: Iterable[str], seed: int, every: int | None = None) -> None:
    """Run those of ``rows`` that have no results yet.

    Raises:
        OptionError: an unknown row, or the task's dense model has not been trained.
    """
    wanted = [row for row in rows if not _file(task, row, seed).is_file()]
    unknown = [row for row in wanted if row not in KNOWN]
    if unknown:
        raise OptionError(f"There is no row {unknown[0]!r}; there are {', '.join(KNOWN)}.")
    if not model_folder(task).is_dir():
        raise OptionError(f"The dense model of {task.name} is missing; run the command teachers first.")
    if not wanted:
        return
    runner = Run(task, seed, every)
    dense, dense_flops = runner.score(runner.dense), runner.dense_flops()
    for row in wanted:
        started = time.perf_counter()
        found = _rows(runner, row)
        record = {
            "task": task.name,
            "headline": task.headline,
            "long_text": task.long_text,
            "seed": seed,
            "dense": dense,
            "dense_flops": dense_flops,
            "test_examples": len(runner.test.examples),
            "seconds": round(time.perf_counter() - started),
            "versions": {name: version(name) for name in PACKAGES},
            "threads": torch.get_num_threads(),
            "precision": "bf16 autocast",
            "rows": found,
        }
        write(_file(task, row, seed), record)


def _rows(runner: Run, row: str) -> list[dict[str, Any]]:
    if row == "free":
        return train_free(runner)
    if row == "truncated":
        cut = truncation(runner.task, runner.dense, runner.tokenizer, runner.test.examples)
        return [
            {"task": runner.task.name, "row": "truncated", "seed": 0, "budget": _number(share)} | figures
            for share, figures in cut.items()
        ]
    keep = pruned_folder(runner.task.name, runner.seed) if row == "both" else None
    return list(runner.trained(row, RECIPES[runner.task.name], keep))


def read(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records that `run` wrote."""
    for path in sorted(folder.glob("*.json")):
        if not path.match(DEPLOYED):
            yield json.loads(path.read_text(encoding="utf-8"))


def read_deployed(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records of the command ``deployed``."""
    for path in sorted(folder.glob(DEPLOYED)):
        yield json.loads(path.read_text(encoding="utf-8"))


def write_deployed(task: Task, seed: int, record: dict[str, Any]) -> Path:
    """Keep a record of the command ``deployed``; gives its file."""
    path = _file(task, "deployed", seed)
    write(path, record)
    return path


def _file(task: Task, row: str, seed: int) -> Path:
    return FOLDER / f"{task.name}.{row}.{seed}.json"


def _number(share: str) -> float:
    from fractions import Fraction

    return float(Fraction(share))
