"""The benchmark "decoder-genai": which options it takes, and the page of its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.store import Group
from benchmarks.tasks.decoder_genai import OPTIMUM, PRUNED, Benchmark
from prunepass.errors import OptionError


def test_a_folder_that_is_none() -> None:
    with pytest.raises(OptionError, match=r"holds no openvino_model\.xml"):
        list(Benchmark(dense="nowhere").cells())


def test_times_are_of_the_pipeline_in_turns() -> None:
    order: list[str] = []

    def way(name: str, first: float) -> object:
        def call(prompt: list[int]) -> tuple[float, float]:
            order.append(name)
            return first, 50.0

        return call

    class Prompt:
        shape = (1, 64)

    task = Benchmark(repeats=2)
    calls = {(OPTIMUM, "PA"): way("a", 300.0), (OPTIMUM, "SDPA"): way("b", 200.0), (PRUNED, "SDPA"): way("c", 100.0)}
    rows = list(task._turns(calls, Prompt()))  # type: ignore[arg-type]  # calls of the test
    assert "".join(order) == "abc" + "abc" + "cba"
    assert [row["over_best_dense"][0] for row in rows] == [0.667, 1.0, 2.0]
    shared = {"precision": "f32", "stages": "4:1/2", "repeats": 2, "threads": 2, "date": "2026-01-01", "versions": {}}
    page = "\n".join(Benchmark.page([Group(shared | {"processor": "CPU"}, rows)]))
    assert f"| 64 | {PRUNED} | SDPA | 100 | 2.00x (2.00 to 2.00) | 20.0 |" in page
