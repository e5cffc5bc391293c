"""The decoder's speed benchmark on a tiny shape: what it counts and holds, not how fast it is."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.decoder import speed as speed_module
from benchmarks.decoder.memory import watch_peak
from benchmarks.decoder.speed import SHAPES, Speed, run_speed
from benchmarks.decoder.tables import markdown
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


def test_lengths_are_measured_and_written(tiny: str, tmp_path: Path) -> None:
    path = run_speed(Speed(tiny, dtype="float32", new=3, repeats=2), (40, 64), tmp_path)
    assert path.name == "speed.tiny.eager-f32.cpu.json"
    record = json.loads(path.read_text())
    assert [found["length"] for found in record["speed"]] == [40, 64]
    plan = PrunePlan.sdtp(LAYERS)
    for found in record["speed"]:
        n = found["length"]
        assert found["flops"]["dense"] > found["flops"]["pruned"] > 0
        kept = [n] * LAYERS
        for stage in plan.stages:
            kept[stage.layer :] = [kept_count(n, stage.keep, plan.protect)] * (LAYERS - stage.layer)
        a_token = 2 * HEADS * WIDTH * 4 / 2**20  # keys and values; of the tokens generated all but the last are in
        held = {"dense": LAYERS * (n + 2), "pruned": sum(kept) + LAYERS * 2}
        assert found["cache_mebibytes"] == {way: pytest.approx(c * a_token, abs=0.006) for way, c in held.items()}
        assert found["speedup"] / found["flops_ratio"] == pytest.approx(found["share_of_flops_ratio"], abs=1e-3)
        assert all(peak is None or peak >= 0 for peak in found["peak_mebibytes"].values())
        assert all(rate > 0 for rate in found["tokens_per_second"].values())
    page = markdown([record])
    assert "## Speed: tiny, eager, f32" in page
    assert f"| 40 | {record['speed'][0]['first_token_ms']['dense']['p50']:.0f} | " in page


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
    monkeypatch.setattr(speed_module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="cuda cannot be measured here"):
        run_speed(Speed(tiny, device="cuda"), (40,), tmp_path)
    with pytest.raises(OptionError, match="no shape 'llama'"):
        run_speed(Speed("llama"), (40,), tmp_path)
