"""How long the passes take, by depth of the model, for the default plan of 2 stages against one of 10.

A BERT of each depth is captured once; its graph is pruned several times and the median of each pass is kept. Weights
lie on the meta device: no pass reads them, and 96 layers of real width need no memory. CPU seconds are this process's
own, which a busy machine does not change; the columns of the single passes are wall time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.markdown import settings, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import PruneResult, prune_graph
from prunepass.plan import PrunePlan, Stage

STAGES = 10


@dataclass(frozen=True)
class Benchmark(Task):
    title = "How long the passes take"
    introduction = (
        "BERT of several depths, captured once; medians over several runs. *default* is the default plan of 2 "
        "stages. CPU seconds are the process's own; the columns of the single passes are wall seconds, capturing "
        "is a column of its own."
    )
    layers: tuple[int, ...] = option((12, 24, 48, 96), "depths to measure")
    width: int = option(768, "hidden width; the feed-forward part is four times that")
    length: int = option(128, "length of the example")
    repeats: int = option(5, "runs of which the median is taken")

    def cells(self) -> Iterator[Cell]:
        for layers in self.layers:
            yield Cell({"layers": layers, "width": self.width, "length": self.length}, partial(measure, self, layers))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        passes = list(dict.fromkeys(name for group in groups for row in group.rows for name in row["passes"]))
        columns = ["layers", "plan", "stages", "nodes", "after", "capture s", "passes s", "CPU s", "CPU ms/layer"]
        lines = []
        for shared, row in ((g.shared, r) for g in groups for r in g.rows):
            counts = (shared["layers"], row["plan"], row["stages"], shared["nodes"], row["nodes_after"])
            times = [f"{shared['capture_seconds']:.2f}", f"{row['wall']:.3f}", f"{row['cpu']:.3f}"]
            each = [f"{row['passes'].get(name, 0.0):.3f}" for name in passes]
            lines.append([*map(str, counts), *times, f"{1e3 * row['cpu'] / shared['layers']:.1f}", *each])
        yield table([*columns, *passes], lines)
        yield settings(groups)


def measure(options: Benchmark, layers: int, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row a plan, and what capturing took."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    captured = _capture(layers, options.width, options.length)
    seconds = time.perf_counter() - started
    stages = [Stage(i * layers // 12 + 1, f"{11 - i}/12") for i in range(STAGES)]
    plans = {"default": PrunePlan.default(layers), f"{STAGES} stages": PrunePlan(stages)}
    _timed(captured, plans["default"])  # the first run pays for imports and caches
    rows = []
    for name, plan in plans.items():
        runs = [_timed(captured, plan) for _ in range(options.repeats)]
        result = runs[-1][2]
        rows.append(
            {
                "plan": name,
                "stages": len(plan.stages),
                "nodes_after": len(result.graph_module.graph.nodes),
                "wall": round(median(run[0] for run in runs), 4),
                "cpu": round(median(run[1] for run in runs), 4),
                "passes": {p: round(median(run[2].seconds[p] for run in runs), 4) for p in result.seconds},
            }
        )
    shared = {"nodes": len(captured.graph_module.graph.nodes), "capture_seconds": round(seconds, 4)}
    return shared | {"repeats": options.repeats, **conditions(threads=1)}, rows


def _capture(layers: int, width: int, length: int) -> Captured:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width,
    }
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=layers, **sizes)).eval()
        ids = torch.ones(2, length, dtype=torch.int64)
        return capture_module(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _timed(captured: Captured, plan: PrunePlan) -> tuple[float, float, PruneResult]:
    start, start_cpu = time.perf_counter(), time.process_time()
    # As prune() does on a module: new nodes get their metadata when the graph is exported or compiled.
    result = prune_graph(captured.graph_module, plan, metadata=False)
    return time.perf_counter() - start, time.process_time() - start_cpu, result
