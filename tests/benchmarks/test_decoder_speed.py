"""The decoder's speed benchmark on a tiny shape: what it counts and holds, not how fast it is."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.decoder.memory import watch_peak
from benchmarks.runner import run
from benchmarks.store import Group, read
from benchmarks.tasks import decoder_speed
from benchmarks.tasks.decoder_speed import SHAPES, Benchmark
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.plan import kept_count

LAYERS, HEADS, WIDTH = 4, 2, 16


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    config = partial(
        transformers.LlamaConfig,
        vocab_size=50,
        hidden_size=HEADS * WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        eos_token_id=None,
    )
    monkeypatch.setitem(SHAPES, "tiny", config)
    return "tiny"


def test_the_page_compares_first_tokens_decoding_and_memory() -> None:
    row = {
        "length": 40,
        "flops": [300, 200],
        "first_token_ms": [[90.0, 99.0], [50.0, 51.0]],
        "speedup_quartiles": [1.7, 1.9],
        "tokens_per_second": [4.0, 5.0],
        "cache_mebibytes": [2.0, 1.25],
        "peak_mebibytes": [None, 7],
    }
    shared = {"model": "tiny", "target": "eager", "precision": "f32", "repeats": 2, "threads": 1, "processor": "One"}
    (page,) = Benchmark.page([Group(shared, [row])])
    assert "1 thread of One; 2 calls of each way" in page
    assert "| 40 | 90 | 50 | 1.80 (1.70 to 1.90) | 1.50 | 120 % | 4.00 | 5.00 | 2.0 | 1.2 |  | 7 |" in page


@pytest.mark.slow
def test_lengths_are_measured_and_written(tiny: str, tmp_path: Path) -> None:
    options = Benchmark(tiny, dtype="float32", lengths=(40, 64), new=3, repeats=2)
    assert [outcome.what for outcome in run("decoder-speed", options, tmp_path)] == ["written"]
    (group,) = read("decoder-speed", tmp_path)
    assert [found["length"] for found in group.rows] == [40, 64]
    plan = PrunePlan.sdtp(LAYERS)
    for found in group.rows:
        n = found["length"]
        assert found["flops"][0] > found["flops"][1] > 0
        kept = [n] * LAYERS
        for stage in plan.stages:
            kept[stage.layer :] = [kept_count(n, stage.keep, plan.protect)] * (LAYERS - stage.layer)
        a_token = 2 * HEADS * WIDTH * 4 / 2**20  # keys and values; of the tokens generated all but the last are in
        held = [LAYERS * (n + 2), sum(kept) + LAYERS * 2]
        assert found["cache_mebibytes"] == [pytest.approx(count * a_token, abs=0.006) for count in held]
        assert all(peak is None or peak >= 0 for peak in found["peak_mebibytes"])
        assert all(rate > 0 for rate in found["tokens_per_second"])
    (page,) = Benchmark.page([group])
    assert "## tiny, eager, f32" in page
    assert f"| 40 | {group.rows[0]['first_token_ms'][0][0]:.0f} | " in page


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process's peak is read as Linux tells it")
def test_the_peak_is_what_was_held_beyond_the_beginning() -> None:
    held = torch.ones(2**23)  # 32 MiB, from before
    with watch_peak("cpu") as outer:
        for size in (2**24, 2**22, 2**23):  # the largest has 64 MiB; each is freed before the next is there
            torch.ones(size)
    with watch_peak("cpu") as inner:
        held += 1
    assert outer.mebibytes == pytest.approx(64, abs=6)
    assert inner.mebibytes == pytest.approx(0, abs=4)


def test_a_device_that_is_not_there_is_said(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_speed.torch.cuda, "is_available", lambda: False)
    (found,) = run("decoder-speed", Benchmark(tiny, device="cuda"), tmp_path)
    assert (found.what, "CUDA" in found.reason) == ("skipped", True)
    with pytest.raises(OptionError, match="no shape 'llama'"):
        list(Benchmark("llama").cells())
