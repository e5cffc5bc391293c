"""What pruning a prompt costs in recall: a pass key, or one of several keys, by length and depth.

The question is the prompt's end, or comes only after the prompt. Models are those that the task decoder-pretrain wrote,
and Gemma 3 270M (``--model gemma3-270m``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder.gemma import NAME as GEMMA
from benchmarks.decoder.gemma import pretrained
from benchmarks.decoder.model import Pruned, Subject
from benchmarks.decoder.recall import Recall
from benchmarks.decoder.texts import CORPORA
from benchmarks.decoder.training import COUNTS, TRAINED, Pretrained, Trained
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.tasks.decoder import ROWS, pruned_row

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: statements in a row
TASKS = dict(zip(("passkey", "key-value"), COUNTS, strict=True))
#: share of right answers below which a model has no recall that pruning could lose
EMERGED = 0.5
#: points of the training curve that are shown
POINTS = 8
_LABELS = {"full": "full model", **ROWS}


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Recall after pruning the prompt"
    introduction = (
        "A model that gives fewer than half of the answers is not pruned; and random scores depend on the place "
        "in the row, so one seed loses a depth in all rows or in none."
    )
    model: str = option("recall-llama", f"folder of the model, in the benchmark's cache, or {GEMMA}")
    lengths: tuple[int, ...] = option((128, 384), "tokens of the prompts")
    budget: float = option(0.6, "share of the dense prefill's FLOPs")
    seeds: int = option(3, "how many, of questions, of random scores and of predictors")
    rows: int = option(16, "questions at each depth, with each seed")
    tasks: tuple[str, ...] = option(tuple(TASKS), "what is asked for")
    ways: tuple[str, ...] = option(tuple(ROWS), "to rank tokens, that are measured")
    at_once: int = option(16, "prompts that run at a time")

    def cells(self) -> Iterator[Cell]:
        for task in self.tasks:
            chosen(task, TASKS, "kind of question")
        for way in self.ways:
            chosen(way, ROWS, "way to rank tokens")
        yield Cell({"model": self.model, "budget": self.budget, "questions": self.rows}, partial(_measure, self))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            training = group.shared["pretraining"]
            if training is None:  # a model of others
                questions = f"{group.shared['questions']} questions at each depth with each seed"
                yield f"## {group.shared['model']}\n\n{questions}. {setting(group.shared)}."
                yield from _tasks(group)
                continue
            recipe = training["recipe"]
            lengths = list(map(str, recipe["lengths"]))
            listed = f"{', '.join(lengths[:-1])} and {lengths[-1]}" if len(lengths) > 1 else lengths[0]
            yield (
                f"## {group.shared['model']}\n\n{training['weights']:,} weights, trained for {recipe['steps']} steps "
                f"of {recipe['batch']} tokens on rows of {listed} tokens. Right answers in %, on rows of "
                f"{recipe['lengths'][-1]} tokens that are not trained on, by step of the training: in rows of words "
                f"again and again, of statements alone, and of some statements within text. {setting(group.shared)}."
            )
            yield _curve(training["curve"])
            yield from _tasks(group)


class Questions:
    """Rows [R, P + C] by depth: the prompt, then what is asked after it and the answer.

    Args:
        visible: the question is the prompt's end; else it comes after the prompt.
        begin: id that each row begins with; None where there is none.
    """

    def __init__(
        self, recall: Recall, text: list[int], prompt: int, count: int, visible: bool, begin: int | None = None
    ) -> None:
        self._recall, self._text, self._prompt, self._count, self._visible = recall, text, prompt, count, visible
        self._begin = [] if begin is None else [begin]

    def draw(self, depth: float, rows: int, seed: int) -> Tensor:
        """``rows`` rows with the answer at ``depth``."""
        rng = random.Random(f"{seed} {depth}")
        return torch.tensor([self._ids(rng, depth) for _ in range(rows)])

    def _ids(self, rng: random.Random, depth: float) -> list[int]:
        question = len(self._recall.passkey) if self._count == 1 else 1
        length = self._prompt - (question if self._visible else 0) - len(self._begin)
        start = rng.randrange(len(self._text) - length)
        asked = self._recall.question(rng, length, depth, self._count, self._text[start : start + length])
        return [*self._begin, *asked.context, *asked.question, asked.answer]


def by_depth(pruned: Pruned, questions: Questions, rows: int, seed: int, batch: int) -> dict[str, float]:
    """Share of right answers by depth; ``batch`` rows run at a time."""
    found = {}
    for depth in DEPTHS:
        ids = questions.draw(depth, rows, seed)
        parts = ids.split(batch)
        right = sum(int((pruned.logits(part)[:, -1].argmax(-1) == part[:, -1]).sum()) for part in parts)
        found[f"{depth:g}"] = round(right / rows, 4)
    return found


def _measure(options: Benchmark, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
    """Pruned rows where the dense model gives half of the answers at least: below that nothing is to lose."""
    found = pretrained(options.model)
    weights, training = found.trained(range(options.seeds), options.ways)
    shared = {"pretraining": found.pretraining, "training": dict(training)}
    return shared | conditions(threads=torch.get_num_threads()), _rows(options, found, weights)


def _rows(options: Benchmark, model: Pretrained, weights: Trained) -> Rows:
    text = model.text(CORPORA, "test")
    for length in options.lengths:
        subject = Subject(model.measured, length, model.layers)
        for task in options.tasks:
            for visible in (False, True):
                questions = Questions(model.recall, text, length, TASKS[task], visible, model.begin)
                for row in _of_task(options, subject, questions, weights):
                    yield {"task": task, "prompt": length, "visible": visible, **row}


def _of_task(options: Benchmark, subject: Subject, test: Questions, weights: Trained) -> Rows:
    recalled = []
    for seed in range(options.seeds):
        found = by_depth(Pruned(subject), test, options.rows, seed, options.at_once)
        recalled.append(fmean(found.values()))
        yield {"row": "full", "seed": seed, "right": found}
    for row in options.ways if min(recalled) >= EMERGED else ():
        if row in TRAINED and (row, 0) not in weights:
            continue  # no predictors of this form are trained for the model
        for seed in range(options.seeds):
            batch = min(options.at_once, options.rows)
            pruned, _ = pruned_row(subject, row, options.budget, seed, weights, batch)
            found = by_depth(pruned, test, options.rows, seed, batch)
            yield {"row": row, "seed": seed, "right": found, "flops": round(pruned.flops(batch), 5)}


# -- page ------------------------------------------------------------------------------------------------------------


def _curve(points: Sequence[Mapping[str, float]]) -> str:
    every = max(1, len(points) // POINTS)
    shown = points[every - 1 :: every]
    rows = [[name, *(f"{100 * p[name]:.0f}" for p in shown)] for name in ("repeats", "statements", "needles")]
    rows.append(["training loss", *(f"{p['loss']:.2f}" for p in shown)])
    return table(["step", *(f"{p['step']:.0f}" for p in shown)], rows)


def _tasks(group: Group) -> Iterator[str]:
    """One table for each task, with the question in the prompt and after it."""
    for task in dict.fromkeys(found["task"] for found in group.rows):
        for visible in (False, True):
            mine = [f for f in group.rows if (f["task"], f["visible"]) == (task, visible)]
            if not mine:
                continue
            depths = list(mine[0]["right"])
            where = "at the prompt's end" if visible else "after the prompt"
            yield (
                f"### {task}, the question {where}\n\nRight answers in %, by depth; pruned rows at "
                f"{group.shared['budget']:g} of the FLOPs.\n\n{table(['tokens', '', *depths], _lines(mine, depths))}"
            )


def _lines(found: Sequence[Mapping[str, Any]], depths: Sequence[str]) -> Iterator[list[str]]:
    for length in dict.fromkeys(f["prompt"] for f in found):
        for row, label in _LABELS.items():
            mine = [f["right"] for f in found if (f["prompt"], f["row"]) == (length, row)]
            if mine:
                yield [str(length), label, *(f"{100 * fmean(right[depth] for right in mine):.0f}" for depth in depths)]
