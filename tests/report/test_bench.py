"""What `bench` says of lengths at which pruning loses time."""

from __future__ import annotations

import pytest
import torch

import zoo
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.cli.benched import print_bench
from prunepass.report.bench import BatchTiming, BenchResult, Timing, _slower_up_to, bench


@pytest.mark.parametrize(
    ("timings", "length"),
    [
        ([(8, 1.0, 1.2), (16, 2.0, 1.9), (64, 9.0, 5.0)], 16),
        ([(64, 9.0, 5.0), (8, 1.0, 1.2), (16, 2.0, 1.7)], 8),
        ([(8, 1.0, 0.9), (16, 2.0, 1.9)], None),
        ([(8, 1.0, 1.3), (8, 1.0, 0.6), (9, 1.0, 0.9)], None),  # batches of one length count together
        ([(8, 1.0, 1.3), (64, 9.0, 9.1)], 64),
    ],
)
def test_lengths_that_lose_are_told_from_those_that_gain(
    timings: list[tuple[int, float, float]], length: int | None
) -> None:
    assert _slower_up_to([BatchTiming(*timing) for timing in timings]) == length


def result(slower_up_to: int | None) -> BenchResult:
    timing = Timing(1.0, 1.0, 1.0)
    by_batch = (BatchTiming(8, 1.0, 1.5), BatchTiming(64, 9.0, 5.0))
    return BenchResult("eager", 2, 2, 72, 1, 1, timing, timing, 1.0, by_batch, slower_up_to, {}, ())


def test_who_prunes_short_texts_is_warned(capsys: pytest.CaptureFixture[str]) -> None:
    print_bench(result(slower_up_to=8))
    said = " ".join(capsys.readouterr().out.split())
    assert "does not pay here for texts of up to 8 tokens" in said
    assert "1 batch takes 1.50 times" in said
    print_bench(result(slower_up_to=None))
    assert "does not pay" not in capsys.readouterr().out


def test_each_batch_has_its_own_times() -> None:
    ids = [torch.arange(2 * n).reshape(2, n) % 40 + 5 for n in (6, 19)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    plan = PrunePlan([Stage(1, 0.5)], ScorerSpec("norm"))
    found = bench(zoo.tiny("bert"), plan, batches, target="eager", repeats=3)
    assert [timing.length for timing in found.by_batch] == [6, 19]
    assert all(timing.dense > 0 < timing.pruned for timing in found.by_batch)
    assert found.to_dict()["by_batch"][1]["length"] == 19
