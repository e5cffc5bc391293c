"""Made-up records of the latency benchmark, as it writes them."""

from __future__ import annotations

from typing import Any


def times(p50: float) -> dict[str, float]:
    return {"p50": p50, "p95": 2 * p50}


def cell(budget: str, ratio: float, pruned: float, ideal: float, dense: float = 100.0) -> dict[str, Any]:
    return {
        "budget": budget,
        "pruned": times(pruned),
        "ideal": times(ideal),
        "flops_ratio": ratio,
        "speedup": dense / pruned,
        "speedup_quartiles": [1.0, 2.0],
        "ideal_speedup": dense / ideal,
        "overhead": pruned / ideal,
        "overhead_quartiles": [1.1, 1.4],
        "share_of_flops_ratio": dense / pruned / ratio,
    }


def record(*cells: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = {
        "model": "bert-base",
        "target": "openvino-f32",
        "length": 128,
        "batch": 1,
        "shapes": "dynamic",
        "scorer": "norm",
        "stages": 4,
        "repeats": 20,
        "threads": 2,
        "processor": "Some Processor",
        "versions": {"torch": "2.13.0"},
        "dense": times(100.0),
        "cells": list(cells) or [cell("1/4", 4.0, 40.0, 32.0), cell("1/2", 2.0, 62.5, 50.0)],
    }
    return made | more


def corpus_record() -> dict[str, Any]:
    paddings = ("max", "batch", "sorted")
    rates = {padding: {"texts_per_second": 10.0 * i, **times(5.0)} for i, padding in enumerate(paddings, 1)}
    ratios = {mine: {other: 1.0 + i + j / 10 for j, other in enumerate(paddings)} for i, mine in enumerate(paddings)}
    made = {"budget": "1/4", "pruned": rates, "speedup": ratios, "flops_ratio": ratios}
    sizes = {"corpus": "sst2", "texts": 16, "max_length": 128, "mean_tokens": 25.1, "median_tokens": 24}
    return record(**sizes, cells=[made], dense=rates)
