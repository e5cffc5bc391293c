"""Throughput on texts of real lengths: dense and pruned, each padded to the maximum, to the batch, and sorted first.

A speed-up is a quotient, and papers differ in what stands above it: a dense model that pads every text to the maximum
is several times slower than one that does not. So all three dense ways are timed and each pruned one is held
against each of them. The texts are real and the weights random: time hangs on the lengths alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency.cells import Group, Setup, compile_for, runtime_state
from benchmarks.latency.conditions import conditions
from benchmarks.latency.models import find_model, inputs
from benchmarks.latency.plans import Planner
from benchmarks.latency.targets import How, find_target
from benchmarks.latency.turns import in_turns, p50, summary
from prunepass import PrunePlan
from prunepass.cost import FlopCounter
from prunepass.errors import OptionError

__all__ = ["CORPORA", "PADDINGS", "Texts", "load_texts", "measure_corpus", "padded"]

log = logging.getLogger(__name__)

CORPORA = ("20newsgroups", "sst2")
PADDINGS = {
    "max": "padded to the maximum",
    "batch": "padded to the batch",
    "sorted": "sorted by length, then padded to the batch",
}
SEED = 0
DENSE = "dense"
#: batches of all lengths follow each other as they do in use, so each call pays for its change of shapes
_ONE_AFTER_THE_OTHER = partial(in_turns, settle=0)
#: dense or a budget, padding, which batch
Key = tuple[str, str, int]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Texts as token ids, in no order, each of at most ``max_length`` tokens."""

    corpus: str
    ids: Sequence[Sequence[int]]
    max_length: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(text) for text in self.ids]


def load_texts(corpus: str, count: int) -> Texts:
    """So many texts of a data set's test examples, drawn at random with a fixed seed.

    Raises:
        OptionError: no such corpus, its data are not there, or it has fewer texts.
    """
    if corpus not in CORPORA:
        raise OptionError(f"There is no corpus {corpus!r}; there are {', '.join(CORPORA)}.")
    from benchmarks.accuracy.tasks import find_task
    from benchmarks.accuracy.teachers import load_tokenizer

    task = find_task(corpus)
    examples = task.test(every=1)
    if count > len(examples):
        raise OptionError(f"{corpus} has {len(examples)} texts, not {count}; ask for fewer or smaller batches.")
    chosen = random.Random(SEED).sample(examples, count)
    rows = task.features(chosen, load_tokenizer()).rows
    return Texts(corpus, [row["input_ids"] for row in rows], task.max_length)


def padded(texts: Texts, batch: int, padding: str) -> list[Batch]:
    """The texts in batches; ``input_ids`` and ``attention_mask`` are int64 [at most batch, width], padded at the end.

    Args:
        padding: one of `PADDINGS`.
    """
    order = sorted(texts.ids, key=len) if padding == "sorted" else list(texts.ids)
    found = []
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = texts.max_length if padding == "max" else max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def measure_corpus(
    group: Group,
    texts: Texts,
    budgets: Sequence[Fraction],
    setup: Setup,
    turns: Callable[..., dict[Key, list[float]]] = _ONE_AFTER_THE_OTHER,
) -> dict[str, Any]:
    """The record of a corpus. Budgets are shares of the dense FLOPs on real tokens; ``group.length`` is not used.

    Args:
        turns: takes the times; see `turns.in_turns`.

    Raises:
        OptionError: texts too long for the model, static shapes, a budget that cannot be met, or a target that cannot
            be measured here.
    """
    shape, target = find_model(group.model), find_target(group.target)
    if reason := target.why_not():
        raise OptionError(f"Target {group.target} cannot be measured: {reason}.")
    if group.shapes != "dynamic":
        raise OptionError("Texts of all lengths need dynamic shapes; leave out --shapes static.")
    if texts.max_length > shape.longest:
        raise OptionError(f"{shape.name} takes {shape.longest} tokens; {texts.corpus} has up to {texts.max_length}.")
    model = shape.build()
    planner = Planner(model, inputs(model, 2, 16), setup.scorer, setup.stages)
    plans = {DENSE: PrunePlan(())} | {str(b): planner.plan(b, texts.lengths) for b in budgets}
    counters = {name: planner.pruned(plan) if plan.stages else planner.counter for name, plan in plans.items()}
    batches = {padding: padded(texts, group.batch, padding) for padding in PADDINGS}
    with runtime_state(setup.threads):
        model = model.to(target.device, target.dtype)
        how = How(dynamic=True, threads=setup.threads)
        ways: dict[Key, Callable[[], object]] = {}
        for name, plan in plans.items():
            run = compile_for(target, model, plan, batches["max"][0], how)
            for padding, found in batches.items():
                for i, one in enumerate(found):
                    arguments = {key: value.to(target.device) for key, value in one.items()}
                    ways[name, padding, i] = partial(run, **arguments)
        log.info("%s on %s: %d ways, %d repeats", texts.corpus, group, len(ways), setup.repeats)
        times = turns(ways, setup.repeats, seconds=setup.seconds)
    lengths = sorted(texts.lengths)
    return {
        "corpus": texts.corpus,
        "model": group.model,
        "target": group.target,
        "batch": group.batch,
        "batches": len(batches["max"]),
        "texts": len(lengths),
        "max_length": texts.max_length,
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "median_tokens": lengths[len(lengths) // 2],
        "scorer": setup.scorer,
        "stages": setup.stages,
        "repeats": len(times[DENSE, "max", 0]),
        **conditions(target, setup.threads),
        **_figures(times, plans, _flops(counters, batches), batches, len(lengths)),
    }


def _flops(counters: Mapping[str, FlopCounter], batches: Mapping[str, Sequence[Batch]]) -> dict[tuple[str, str], int]:
    """FLOPs of all batches, padding included, by way and padding."""
    return {
        (name, padding): sum(counter.total(*batch["input_ids"].shape) for batch in found)
        for name, counter in counters.items()
        for padding, found in batches.items()
    }


def _figures(
    times: Mapping[Key, Sequence[float]],
    plans: Mapping[str, PrunePlan],
    flops: Mapping[tuple[str, str], int],
    batches: Mapping[str, Sequence[Batch]],
    texts: int,
) -> dict[str, Any]:
    """Throughput of each way, and each pruned one over each dense one: ``speedup[pruned padding][dense padding]``."""
    totals: dict[tuple[str, str], float] = {}
    shown: dict[str, dict[str, Any]] = {}
    for name in plans:
        for padding, found in batches.items():
            medians = [p50(times[name, padding, i]) for i in range(len(found))]
            totals[name, padding] = sum(medians)
            rate = round(1000 * texts / sum(medians), 3)
            shown.setdefault(name, {})[padding] = {"texts_per_second": rate, **summary(medians)}

    def over(amounts: Mapping[tuple[str, str], float], name: str) -> dict[str, dict[str, float]]:
        return {
            mine: {other: round(amounts[DENSE, other] / amounts[name, mine], 4) for other in PADDINGS}
            for mine in PADDINGS
        }

    cells = [
        {
            "budget": name,
            "stages": [stage.to_dict() for stage in plan.stages],
            "pruned": shown[name],
            "speedup": over(totals, name),
            "flops_ratio": over(flops, name),
        }
        for name, plan in plans.items()
        if name != DENSE
    ]
    return {"dense": shown[DENSE], "cells": cells}
