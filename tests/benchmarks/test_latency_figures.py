"""The latency benchmark's arithmetic, files, table and plots, with made-up times and records."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from latency_records import corpus_group, group

from benchmarks.latency.ideal import block_times, ideal_time, ideal_times, lengths_to_time
from benchmarks.latency.plans import block_lengths, places
from benchmarks.store import Group
from benchmarks.tasks import first_call, latency, throughput
from benchmarks.timing import FEWEST, WARM_UP, in_turns, p95, quartiles
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import OptionError

# -- turns -----------------------------------------------------------------------------------------------------------


class Calls:
    """Ways that note who was called, and a clock that each call sets forward by the way's own milliseconds."""

    def __init__(self, **milliseconds: float) -> None:
        self.seen: list[str] = []
        self.now = 0.0
        self.ways = {name: self.way(name, taken) for name, taken in milliseconds.items()}

    def way(self, name: str, taken: float) -> Callable[[], None]:
        def call() -> None:
            self.seen.append(name)
            self.now += taken / 1000

        return call

    def clock(self) -> float:
        return self.now


def test_each_repeat_times_every_way_once_and_no_warm_up() -> None:
    calls = Calls(a=1, b=2, c=4)
    times = in_turns(calls.ways, 6, settle=0, clock=calls.clock)
    assert times == {"a": pytest.approx([1] * 6), "b": pytest.approx([2] * 6), "c": pytest.approx([4] * 6)}
    repeats = calls.seen[WARM_UP * 3 :]
    assert all(sorted(repeats[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_nobody_follows_itself_or_always_the_same_one(count: int) -> None:
    calls = Calls(**{f"way{i}": 1.0 for i in range(count)})
    in_turns(calls.ways, 2 * count, settle=0, clock=calls.clock)
    repeats = calls.seen[WARM_UP * count :]
    assert all(one != two for one, two in itertools.pairwise(repeats))
    for way in calls.ways if count > 2 else ():  # two ways have no other turn than one after the other
        assert len({two for one, two in itertools.pairwise(repeats) if one == way}) > 1


def test_the_call_before_each_timed_one_is_of_the_same_way_and_not_timed() -> None:
    calls = Calls(a=1, b=2, c=4)
    times = in_turns(calls.ways, 4, settle_ms=0, clock=calls.clock)
    assert times["c"] == pytest.approx([4] * 4)
    repeats = calls.seen[WARM_UP * 3 :]
    assert len(repeats) == 2 * 3 * 4
    assert repeats[::2] == repeats[1::2]


def test_a_fast_way_runs_a_while_before_it_is_timed() -> None:
    calls = Calls(fast=3, slow=70)
    times = in_turns(calls.ways, 4, settle_ms=20, clock=calls.clock)
    assert times == {"fast": pytest.approx([3] * 4), "slow": pytest.approx([70] * 4)}
    repeats = calls.seen[WARM_UP * 2 :]
    assert (repeats.count("fast"), repeats.count("slow")) == (4 * (7 + 1), 4 * (1 + 1))


def test_a_slow_cell_takes_the_fewest_repeats() -> None:
    calls = Calls(a=600, b=600)
    assert len(in_turns(calls.ways, 20, settle=0, seconds=1, clock=calls.clock)["a"]) == FEWEST
    assert len(in_turns(calls.ways, 20, settle=0, seconds=12, clock=calls.clock)["a"]) > FEWEST


def test_no_repeats_are_refused() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        in_turns({"a": lambda: None}, 0)


def test_percentiles() -> None:
    assert p95([float(n) for n in range(1, 101)]) == 95.0
    assert p95([3.0, 1.0, 2.0]) == 3.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)


# -- the ideal -------------------------------------------------------------------------------------------------------


def linear(blocks: int, lengths: list[int], outside: float = 10.0, per_token: float = 0.5) -> dict[int, float]:
    """Times of a runtime whose blocks take ``per_token`` a token, and the rest a call and a tenth of that a token."""
    return {n: outside + 0.05 * n + blocks * per_token * n for n in lengths}


def test_the_ideal_of_a_plan_that_prunes_nothing_is_the_dense_time() -> None:
    whole, one = {64: 91.7}, {64: 13.3}
    assert ideal_time(whole, one, [64] * 12, 64) == pytest.approx(91.7)


def test_the_ideal_takes_each_block_at_its_length_and_the_rest_at_full_length() -> None:
    lengths = [100, 100, 40, 10]
    whole, one = linear(4, [100, 40, 10]), linear(1, [100, 40, 10])
    assert block_times(whole, one, 4) == {100: pytest.approx(50), 40: pytest.approx(20), 10: pytest.approx(5)}
    assert ideal_time(whole, one, lengths, 100) == pytest.approx(10 + 5 + 50 + 50 + 20 + 5)


def test_what_one_block_takes_at_every_length_alike_leaves_the_ideal_alone() -> None:
    lengths = [100, 40, 40, 10]
    whole, one = linear(4, lengths), linear(1, lengths)
    warm = {n: taken - 3 for n, taken in one.items()}
    assert ideal_time(whole, warm, lengths, 100) == pytest.approx(ideal_time(whole, one, lengths, 100))


def test_the_ideal_with_tokens_gone_before_the_first_block() -> None:
    whole, one = linear(2, [100, 40]), linear(1, [100, 40])
    assert ideal_time(whole, one, [40, 40], 100) == pytest.approx(10 + 5 + 20 + 20)


def test_each_repeat_has_an_ideal_of_its_own() -> None:
    whole, one = {8: [8.0, 80.0], 4: [4.0, 40.0]}, {8: [2.0, 20.0], 4: [1.0, 10.0]}
    assert ideal_times(whole, one, [8, 4, 4], 8) == [pytest.approx(2 + 1.5 + 1.5), pytest.approx(20 + 15 + 15)]


def test_a_single_block_has_no_difference() -> None:
    with pytest.raises(OptionError, match="at least 2 blocks"):
        block_times({8: 1.0}, {8: 1.0}, 1)


def test_lengths_to_time_hold_the_full_one() -> None:
    assert lengths_to_time(64, [40, 40, 12], [12, 5, 5]) == [64, 40, 12, 5]


# -- plans -----------------------------------------------------------------------------------------------------------


def test_stages_are_spread_over_the_depth() -> None:
    assert places(12, Fraction(1, 2), 4) == [1, 3, 6, 9]
    assert places(12, Fraction(1, 8), 4) == [0, 3, 6, 9]
    assert places(6, Fraction(1, 4), 0) == [0, 1, 2, 3, 4, 5]
    assert places(6, Fraction(1, 4), 99, from_start=False) == [1, 2, 3, 4, 5]


def test_block_lengths_are_the_plan_s_counts() -> None:
    plan = PrunePlan((Stage(1, Fraction(1, 2)), Stage(3, Fraction(1, 10))), protect=Protect(first=2))
    assert block_lengths(plan, 4, 15) == [15, 8, 8, 2]
    assert block_lengths(PrunePlan(()), 3, 15) == [15, 15, 15]


# -- pages -----------------------------------------------------------------------------------------------------------


def page(*groups: Group) -> str:
    return "\n\n".join(latency.Benchmark.page(groups))


def test_the_page_shows_each_cell_by_budget() -> None:
    found = page(group())
    lines = [line for line in found.splitlines() if line.startswith("| 128 x 1 ")]
    assert lines == [
        "| 128 x 1 | 1/2 | 100 (200) | 62.5 (125) | 50 (100) | 2.00x | 1.60x | 2.00x | 1.25 (1.10 to 1.40) | 80 % |",
        "| 128 x 1 | 1/4 | 100 (200) | 40 (80) | 32 (64) | 4.00x | 2.50x | 3.12x | 1.25 (1.10 to 1.40) | 62 % |",
    ]
    assert "2 threads of Some Processor; torch 2.13.0; 2026-11-20; 20 repeats" in found


def test_the_page_keeps_runs_of_different_settings_apart() -> None:
    found = page(group(), group(length=512), group(threads=1), group(shapes="static"))
    assert found.count("## ") == 3


def test_the_page_holds_a_corpus_against_every_dense_way() -> None:
    (found,) = throughput.Benchmark.page([corpus_group()])
    start = "| pruned to 1/4 | padded to the batch | 40 |"
    (line,) = [line for line in found.splitlines() if line.startswith(start)]
    assert line == f"{start} 4.00x (2.00x) | 2.00x (2.10x) | 1.33x (2.20x) |"


def test_the_page_of_first_calls() -> None:
    way = {"seconds": 1.25, "cpu_seconds": 2.5, "mebibytes": 7}
    of = {"model": "tiny", "target": "eager-f32", "length": 32, "budget": "1/2"}
    table, _ = first_call.Benchmark.page([Group(of, [{"way": name, **way} for name in ("dense", "pruned")])])
    assert "| tiny | eager-f32 | 32 | 1/2 | 1.2 (2.5) | 1.2 (2.5) |  |  | 7 to 7 |" in table
