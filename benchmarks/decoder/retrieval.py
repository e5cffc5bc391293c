"""Recall after pruning: a pass key, or one of several keys, by depth; asked for in the prompt, or only after it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder.predictors import Recipe, Trained
from benchmarks.decoder.pretrained import COUNTS, Pretrained
from benchmarks.decoder.recall import Question, Recall
from benchmarks.decoder.results import FOLDER
from benchmarks.decoder.rows import ROWS, pruned_row
from benchmarks.decoder.subject import Pruned, Subject
from benchmarks.decoder.texts import CORPORA
from benchmarks.records import write

__all__ = ["DEPTHS", "TASKS", "by_depth", "run_recall"]

log = logging.getLogger(__name__)

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: statements in a row
TASKS = dict(zip(("passkey", "key-value"), COUNTS, strict=True))
#: share of right answers below which a model has no recall that pruning could lose
EMERGED = 0.5


class Questions:
    """Rows [R, P + C] by depth: the prompt, then what is asked after it and the answer.

    Args:
        visible: the question is the prompt's end; else it comes after the prompt.
    """

    def __init__(self, recall: Recall, text: list[int], prompt: int, count: int, visible: bool) -> None:
        self._recall, self._text, self._prompt, self._count, self._visible = recall, text, prompt, count, visible

    def draw(self, depth: float, rows: int, seed: int) -> Tensor:
        """``rows`` rows with the answer at ``depth``."""
        rng = random.Random(f"{seed} {depth}")
        return torch.tensor([self._ids(rng, depth) for _ in range(rows)])

    def _ids(self, rng: random.Random, depth: float) -> list[int]:
        question = len(self._recall.passkey) if self._count == 1 else 1
        length = self._prompt - (question if self._visible else 0)
        start = rng.randrange(len(self._text) - length)
        asked: Question = self._recall.question(rng, length, depth, self._count, self._text[start : start + length])
        return [*asked.context, *asked.question, asked.answer]


def by_depth(pruned: Pruned, questions: Questions, rows: int, batch: int, seed: int) -> dict[str, float]:
    """Share of right answers by depth."""
    found = {}
    for depth in DEPTHS:
        ids = questions.draw(depth, rows, seed)
        right = sum(int((pruned.logits(b)[:, -1].argmax(-1) == b[:, -1]).sum()) for b in ids.split(batch))
        found[f"{depth:g}"] = round(right / rows, 4)
    return found


def run_recall(
    model: Path, lengths: tuple[int, ...], recipe: Recipe, seeds: int, rows: int, folder: Path = FOLDER
) -> Path:
    """Measure a model that `benchmarks.decoder.pretrain` wrote; gives the path of ``<model's name>.json``.

    Pruned rows are measured where the dense model gives half of the answers at least: below that nothing is to lose.

    Args:
        recipe: for the budget and the form of the predictors, which are trained already.
    """
    pretrained = Pretrained(model)
    weights, training = pretrained.trained(range(seeds))
    text = pretrained.text(CORPORA, "test")
    record: dict[str, Any] = {
        "model": model.name,
        "pretraining": pretrained.pretraining,
        "training": training,
        "budget": recipe.budget,
        "questions": rows,
        "recall": [],
    }
    for length in lengths:
        subject = Subject(pretrained.model, length)
        for task, count in TASKS.items():
            for visible in (False, True):
                questions = Questions(pretrained.recall, text, length, count, visible)
                for found in _measure(subject, questions, weights, recipe, seeds, rows):
                    record["recall"].append({"task": task, "prompt": length, "visible": visible} | found)
                    log.info("%s", record["recall"][-1])
                    path = write(folder / f"{model.name}.json", record)
    return path


def _measure(
    subject: Subject, test: Questions, weights: Trained, recipe: Recipe, seeds: int, rows: int
) -> Iterator[dict[str, Any]]:
    recalled = []
    for seed in range(seeds):
        found = by_depth(Pruned(subject), test, rows, rows, seed)
        recalled.append(sum(found.values()) / len(found))
        yield {"row": "full", "seed": seed, "right": found}
    if min(recalled) < EMERGED:
        log.info("the dense model recalls too little (%s): nothing is pruned", recalled)
        return
    for row in ROWS:
        for seed in range(seeds):
            pruned, _ = pruned_row(subject, row, recipe.budget, seed, weights, recipe, rows)
            found = by_depth(pruned, test, rows, rows, seed)
            yield {"row": row, "seed": seed, "right": found, "flops": round(pruned.flops(rows), 5)}
