"""Recall by length and depth, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.decoder.rows import ROWS
from benchmarks.records import table

__all__ = ["recall_part"]

_LABELS = {"full": "full model", **ROWS}
#: points of the training curve that are shown
_POINTS = 8


def recall_part(record: Mapping[str, Any]) -> str:
    """The part of the page for one record of the command recall."""
    training = record["pretraining"]
    recipe = training["recipe"]
    head = (
        f"## {record['model']}\n\n{training['weights']:,} weights, trained for {recipe['steps']} steps of "
        f"{recipe['batch']} tokens on rows of {_listed(recipe['lengths'])} tokens. Right answers in %, on rows of "
        f"{recipe['lengths'][-1]} tokens that are not trained on, by step of the training: in rows of words again and "
        "again, of statements alone, and of some statements within text. Below, a model that gives fewer than half of "
        "the answers is not pruned; and random scores depend on the place in the row, so one seed loses a depth in all "
        "rows or in none."
    )
    return "\n\n".join([head, _curve(training["curve"]), *_tasks(record)])


def _curve(points: Sequence[Mapping[str, float]]) -> str:
    every = max(1, len(points) // _POINTS)
    shown = [*points[every - 1 :: every]]
    names = ("repeats", "statements", "needles")
    rows = [[name, *(f"{100 * p[name]:.0f}" for p in shown)] for name in names]
    rows.append(["training loss", *(f"{p['loss']:.2f}" for p in shown)])
    return table(["step", *(f"{p['step']:.0f}" for p in shown)], rows)


def _tasks(record: Mapping[str, Any]) -> Iterator[str]:
    """One table for each task, with the question in the prompt and after it."""
    for task in dict.fromkeys(found["task"] for found in record["recall"]):
        for visible in (False, True):
            mine = [f for f in record["recall"] if (f["task"], f["visible"]) == (task, visible)]
            if not mine:
                continue
            depths = list(mine[0]["right"])
            where = "the prompt's end" if visible else "after the prompt"
            yield (
                f"### {task}, the question {where}\n\nRight answers in %, by depth; pruned rows at "
                f"{record['budget']:g} of the FLOPs.\n\n{table(['tokens', '', *depths], _lines(mine, depths))}"
            )


def _lines(found: Sequence[Mapping[str, Any]], depths: Sequence[str]) -> Iterator[list[str]]:
    for length in dict.fromkeys(f["prompt"] for f in found):
        for row, label in _LABELS.items():
            mine = [f["right"] for f in found if (f["prompt"], f["row"]) == (length, row)]
            if mine:
                yield [str(length), label, *(f"{100 * fmean(right[depth] for right in mine):.0f}" for depth in depths)]


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
