"""The benchmark "images": plans of the FLOPs asked for, and merging after ToMe on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import senses
from benchmarks.images.learning import Views
from benchmarks.images.tome import ToMe, merged_counts, r_for
from benchmarks.tasks.images import PLACES, block_flops, plan_for
from prunepass.errors import OptionError


@pytest.mark.parametrize("place", ["one at 3", "three"])
def test_plans_have_the_flops_asked_for(place: str) -> None:
    plan = plan_for(2.0, place, "norm", "drop")
    counts, now = [], 257
    for block in range(12):
        for stage in plan.stages:
            if stage.layer == block:
                now = -int(-257 * stage.keep // 1)
        counts.append((now, now))
    assert [stage.layer for stage in plan.stages] == list(PLACES[place])
    assert block_flops([(257, 257)] * 12) / block_flops(counts) == pytest.approx(2, rel=0.02)


def test_merging_no_token_is_the_model_itself() -> None:
    model, x = senses.tiny("dinov2"), senses.example("dinov2")
    with torch.no_grad():
        states, sizes = ToMe(model, 0)(x["pixel_values"])
        wanted = model(**x).last_hidden_state
    assert float((states - wanted).abs().max()) < 1e-10
    assert bool((sizes == 1).all())


def test_each_block_merges_r_tokens_and_none_is_lost() -> None:
    model, x = senses.tiny("dinov2"), senses.example("dinov2")
    with torch.no_grad():
        _, sizes = ToMe(model, 6)(x["pixel_values"])
    assert sizes.shape == (2, 13)
    assert [after for _, after in merged_counts(37, 4, 6)] == [31, 25, 19, 13]
    assert bool((sizes.sum(dim=1) == 37).all())
    assert bool((sizes[:, 0] == 1).all())


def test_r_is_the_one_of_the_nearest_flops() -> None:
    r = r_for(block_flops, 257, 12, block_flops([(257, 257)] * 12) / 2)
    assert block_flops([(257, 257)] * 12) / block_flops(merged_counts(257, 12, r)) == pytest.approx(2, rel=0.05)


def test_views_to_learn_from_differ_and_come_again(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"holds no photographs. Name a folder of .jpg or .png files"):
        Views(tmp_path, 4)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "one.png")
    views = Views(tmp_path, 4)
    one, two, again = (views[i]["pixel_values"] for i in (0, 1, 0))
    assert (len(views), one.shape) == (4, (3, 224, 224))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
