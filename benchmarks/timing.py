"""Timing several ways in turns, and the figures of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from prunepass.errors import OptionError

Key = TypeVar("Key")
#: fewer repeats than this are never taken, however slow they are
FEWEST = 5
#: how long a way runs before it is timed
SETTLE_MS = 50.0
#: calls before the first that counts: one compiles, one more lets memory be allocated
WARM_UP = 2


def in_turns(
    ways: Mapping[Key, Callable[[], object]],
    repeats: int,
    *,
    settle: int = 1,
    settle_ms: float = SETTLE_MS,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Milliseconds of every way, one figure a repeat: figures of the same place belong to the same repeat.

    Each repeat calls every way once, so that a machine that is busy now and then slows all of them alike. Where a
    repeat begins moves on and its direction changes every time: nobody always finds the caches that a certain
    other one left.

    Args:
        settle: fewest calls of a way that are not timed, right before each one that is. A runtime with open shapes
            prepares itself anew when the length differs from the call before. Ways that share a compiled model and
            differ in length would pay for that in every turn, and a way that has its model to itself never.
        settle_ms: calls go on so long before the one that is timed, unless ``settle`` is 0: one of a few milliseconds
            else finds the caches full of what other ways left, which a service that runs one model never does.
        seconds: begin no further repeat after so long, once there are `FEWEST`.
        clock: gives seconds.

    Raises:
        OptionError: fewer than one repeat.
    """
    if repeats < 1:
        raise OptionError(f"There must be at least 1 repeat, not {repeats}.")
    for call in ways.values():
        for _ in range(WARM_UP):
            call()
    times: dict[Key, list[float]] = {way: [] for way in ways}
    began = clock()
    for repeat in range(repeats):
        if seconds is not None and repeat >= FEWEST and clock() - began > seconds:
            break
        for way in _order(list(ways), repeat):
            arrived, calls = clock(), 0
            while settle and (calls < settle or 1000 * (clock() - arrived) < settle_ms):
                ways[way]()
                calls += 1
            started = clock()
            ways[way]()
            times[way].append(1000 * (clock() - started))
    return times


def _order(ways: Sequence[Key], repeat: int) -> list[Key]:
    at = repeat % len(ways)
    order = [*ways[at:], *ways[:at]]
    return order[::-1] if repeat % 2 else order


def p50(times: Sequence[float]) -> float:
    """The median."""
    return statistics.median(times)


def p95(times: Sequence[float]) -> float:
    """The smallest time that 95 % of all are at or below."""
    ordered = sorted(times)
    return ordered[-(-95 * len(ordered) // 100) - 1]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def pair(times: Sequence[float]) -> list[float]:
    """Median and 95th percentile for a row, in the unit of the times."""
    return [round(p50(times), 4), round(p95(times), 4)]


def quartile_pair(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quartiles for a row, of the ratios of times that belong to the same repeats."""
    return [round(q, 4) for q in quartiles([a / b for a, b in zip(above, below, strict=True)])]


def times_as_fast(times: Mapping[Key, Sequence[float]], other: Key, way: Key) -> list[float] | None:
    """Median and quartiles of how many times as fast a way is as another, of times that belong to the same turns; None
    where that is itself or did not run."""
    if other == way or other not in times:
        return None
    ratios = [a / b for a, b in zip(times[other], times[way], strict=True)]
    return [round(p50(ratios), 4), *quartile_pair(times[other], times[way])]
