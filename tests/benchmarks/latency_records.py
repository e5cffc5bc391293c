"""Made-up groups of the latency benchmarks, as they write them."""

from __future__ import annotations

from typing import Any

from benchmarks.store import Group


def row(budget: str, flops: int, pruned: float, ideal: float) -> dict[str, Any]:
    times = {"pruned": [pruned, 2 * pruned], "ideal": [ideal, 2 * ideal]}
    return {"budget": budget, "plan": "1:1/2", "flops": flops, **times} | {
        "speedup_quartiles": [1.0, 2.0],
        "overhead_quartiles": [1.1, 1.4],
    }


def group(*rows: dict[str, Any], **more: Any) -> Group:
    shared = {
        "model": "bert-base",
        "target": "openvino-f32",
        "shapes": "dynamic",
        "length": 128,
        "batch": 1,
        "scorer": "norm",
        "stages": 4,
        "threads": 2,
        "date": "2026-11-20",
        "processor": "Some Processor",
        "versions": {"torch": "2.13.0"},
        "repeats": 20,
        "blocks": 12,
        "dense": [100.0, 200.0],
        "dense_flops": 4000,
        "outside_blocks": 1.0,
        "block": {"128": 8.0},
    }
    return Group(shared | more, list(rows) or [row("1/4", 1000, 40.0, 32.0), row("1/2", 2000, 62.5, 50.0)])


def corpus_group() -> Group:
    def rates(factor: float) -> dict[str, list[float]]:
        return {padding: [10.0 * factor * i, 5.0, 5.0] for i, padding in enumerate(("max", "batch", "sorted"), 1)}

    ratios = [[1.0 + i + j / 10 for j in range(3)] for i in range(3)]
    sizes = {"corpus": "sst2", "texts": 16, "max_length": 128, "mean_tokens": 25.1, "median_tokens": 24, "batches": 2}
    rows = [
        {"budget": "1/4", "rates": rates(2), "plan": "1:1/2", "flops_ratio": ratios},
        {"budget": "1", "rates": rates(1)},
    ]
    return group(*rows, **sizes)
