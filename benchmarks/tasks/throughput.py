"""Throughput on texts of real lengths: pruned and dense, each padded to the maximum, to the batch, and sorted first.

A speed-up is a quotient, and papers differ in what stands above it: a dense model that pads every text to the maximum
is several times slower than one that does not. So all three dense ways are timed and each pruned one is held
against each of them. The texts are real and the weights random: time hangs on the lengths alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.latency.models import MODELS, find_model, inputs
from benchmarks.latency.plans import Planner
from benchmarks.latency.targets import TARGETS, How, compile_for, find_target, runtime_state
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, chosen, option
from benchmarks.tasks.latency import Timed, Turns, by_budget
from benchmarks.timing import in_turns, p50, pair
from prunepass import PrunePlan
from prunepass.errors import OptionError

CORPORA = ("20newsgroups", "sst2")
PADDINGS = {
    "max": "padded to the maximum",
    "batch": "padded to the batch",
    "sorted": "sorted by length, then padded to the batch",
}
SEED = 0
DENSE = "1"
#: batches of all lengths follow each other as they do in use, so each call pays for its change of shapes
_ONE_AFTER_THE_OTHER = partial(in_turns, settle=0)


@dataclass(frozen=True)
class Texts:
    """Texts as token ids, in no order, each of at most ``max_length`` tokens."""

    corpus: str
    ids: Sequence[Sequence[int]]
    max_length: int

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.ids]


@dataclass(frozen=True)
class Benchmark(Timed):
    title = "Throughput on texts of real lengths"
    introduction = (
        "Budgets are shares of the dense FLOPs on real tokens. Each pruned way is held against each dense way; "
        "brackets hold the FLOPs ratio, padding included."
    )
    corpora: tuple[str, ...] = option(CORPORA, "whose texts (from the folder that PRUNEPASS_DATA names)")
    models: tuple[str, ...] = option(("minilm-l6",), f"of: {', '.join(MODELS)}")
    targets: tuple[str, ...] = option(("openvino-f32",), f"of: {', '.join(TARGETS)}")
    batch: int = option(8, "texts a call")
    batches: int = option(8, "calls")

    def cells(self) -> Iterator[Cell]:
        for corpus, model, target in product(self.corpora, self.models, self.targets):
            find_model(model)
            yield Cell(
                {"corpus": chosen(corpus, CORPORA, "corpus"), "model": model, "target": target, "batch": self.batch}
                | {"scorer": self.scorer, "stages": self.stages, "threads": self.threads},
                lambda budgets, c=corpus, m=model, t=target: measure(
                    self, m, t, load_texts(c, self.batches * self.batch), [b for b in budgets if b != DENSE]
                ),
                (DENSE, *map(str, self.budgets)),
                find_target(target).why_not(),
            )

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        """Throughput of each way, then every pruned one over every dense one."""
        for group in groups:
            shared, (dense, *pruned) = group.shared, by_budget(group)
            lines = [["dense", PADDINGS[p], _rate(dense, p), "", "", ""] for p in PADDINGS]
            for row in pruned:
                for i, (mine, label) in enumerate(PADDINGS.items()):
                    rate = row["rates"][mine][0]
                    over = [(rate / dense["rates"][p][0], row["flops_ratio"][i][j]) for j, p in enumerate(PADDINGS)]
                    ratios = [f"{faster:.2f}x ({fewer:.2f}x)" for faster, fewer in over]
                    lines.append([f"pruned to {row['budget']}", label, _rate(row, mine), *ratios])
            columns = ["", "its texts", "texts a second", *(f"over dense {label}" for label in PADDINGS.values())]
            yield (
                f"## {shared['corpus']}, {shared['model']}, {shared['target']}, batches of {shared['batch']}\n\n"
                f"{shared['texts']} texts of up to {shared['max_length']} tokens, mean {shared['mean_tokens']}, median "
                f"{shared['median_tokens']}. Scorer {shared['scorer']}; {setting(shared)}; {shared['repeats']} repeats."
                f"\n\n{table(columns, lines)}"
            )


def load_texts(corpus: str, count: int) -> Texts:
    """So many texts of a data set's test examples, drawn at random with a fixed seed.

    Raises:
        OptionError: its data are not there, or it has fewer texts.
    """
    from benchmarks.accuracy.tasks import find_task
    from benchmarks.accuracy.teachers import load_tokenizer

    task = find_task(corpus)
    examples = task.test(every=1)
    if count > len(examples):
        raise OptionError(f"{corpus} has {len(examples)} texts, not {count}; ask for fewer or smaller batches.")
    rows = task.features(random.Random(SEED).sample(examples, count), load_tokenizer()).rows
    return Texts(corpus, [row["input_ids"] for row in rows], task.max_length)


def padded(texts: Texts, batch: int, padding: str) -> list[dict[str, Tensor]]:
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


def measure(
    options: Benchmark,
    model_name: str,
    target_name: str,
    texts: Texts,
    budgets: Sequence[str],
    turns: Turns = _ONE_AFTER_THE_OTHER,
) -> tuple[dict[str, Any], Rows]:
    """A row of the dense model (budget "1") and one a budget; ``flops_ratio[pruned padding][dense padding]``.

    Raises:
        OptionError: texts too long for the model, a budget that cannot be met, or a target not to be had here.
    """
    shape, target = find_model(model_name), find_target(target_name)
    target.check()
    if texts.max_length > shape.longest:
        raise OptionError(f"{shape.name} takes {shape.longest} tokens; {texts.corpus} has up to {texts.max_length}.")
    model = shape.build()
    planner = Planner(model, inputs(model, 2, 16), options.scorer, options.stages)
    plans = {DENSE: PrunePlan(())} | {b: planner.plan(Fraction(b), texts.lengths) for b in budgets}
    batches = {padding: padded(texts, options.batch, padding) for padding in PADDINGS}
    with runtime_state(options.threads):
        model = model.to(target.device, target.dtype)
        ways: dict[Any, Callable[[], object]] = {}
        for name, plan in plans.items():
            run = compile_for(target, model, plan, batches["max"][0], How(dynamic=True, threads=options.threads))
            for padding, found in batches.items():
                for i, one in enumerate(found):
                    ways[name, padding, i] = partial(run, **{k: v.to(target.device) for k, v in one.items()})
        times = turns(ways, options.repeats, seconds=options.timeout)
    flops = {
        (name, padding): sum(counter.total(*batch["input_ids"].shape) for batch in batches[padding])
        for name, plan in plans.items()
        for counter in [planner.pruned(plan) if plan.stages else planner.counter]
        for padding in PADDINGS
    }
    lengths = sorted(texts.lengths)
    shared = {
        **conditions(*target.packages, threads=options.threads, device=target.device),
        "repeats": len(times[DENSE, "max", 0]),
        "batches": len(batches["max"]),
        "texts": len(lengths),
        "max_length": texts.max_length,
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "median_tokens": lengths[len(lengths) // 2],
    }
    rows = []
    for name, plan in plans.items():
        rates: Mapping[str, Any] = {
            padding: _rates([p50(times[name, padding, i]) for i in range(len(found))], len(lengths))
            for padding, found in batches.items()
        }
        row: dict[str, Any] = {"budget": name, "rates": rates}
        if plan.stages:
            ratios = [[round(flops[DENSE, other] / flops[name, mine], 4) for other in PADDINGS] for mine in PADDINGS]
            row |= {"plan": stages_text(plan.stages), "flops_ratio": ratios}
        rows.append(row)
    return shared, rows


def _rates(medians: Sequence[float], texts: int) -> list[float]:
    """Texts a second, and median and 95th percentile of the milliseconds of a batch."""
    return [round(1000 * texts / sum(medians), 3), *pair(medians)]


def _rate(row: Mapping[str, Any], padding: str) -> str:
    return f"{row['rates'][padding][0]:.4g}"
