"""The benchmark "vision-prefill": what is asked for, and the page of its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.store import Group
from benchmarks.tasks.vision_prefill import Benchmark
from prunepass.errors import OptionError


@pytest.mark.parametrize(("options", "said"), [({"model": "llava"}, "no shape 'llava'"), ({"dtype": "f8"}, "no dtype")])
def test_what_is_not_there(options: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        list(Benchmark(**options).cells())


def test_the_language_models_time_is_what_the_tower_leaves() -> None:
    row = {"image_tokens": 576, "flops": [1000, 600], "tower_flops": 200, "speedup_quartiles": [1.4, 1.6]}
    row |= {"first_token_ms": [[900.0, 950.0], [600.0, 650.0]], "tower_ms": [100.0, 110.0]}
    shared = {"model": "llava-1b", "text": 64, "target": "eager", "precision": "f32", "repeats": 2, "threads": 2}
    shared |= {"date": "2026-01-01", "versions": {}, "processor": "CPU"}
    page = "\n".join(Benchmark.page([Group(shared, [row])]))
    assert "| 576 | 64 | 900 | 600 | 1.50 (1.40 to 1.60) | 1.67 | 90 % | 100 | 1.60 | 2.00 | 80 % |" in page
