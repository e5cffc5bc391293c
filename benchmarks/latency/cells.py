"""One group of cells: a model on a target at one length and batch, dense, pruned to each budget, and the ideal of each.

All of them run in one process and in turns, see `turns`; how the ideal is found is told in `ideal`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.latency.conditions import conditions
from benchmarks.latency.ideal import block_times, ideal_time, ideal_times, lengths_to_time
from benchmarks.latency.models import Shape, find_model, inputs
from benchmarks.latency.plans import Planner, block_lengths
from benchmarks.latency.targets import How, Run, Target, find_target
from benchmarks.latency.turns import in_turns, p50, p95, quartiles, summary
from prunepass import PrunePlan
from prunepass.errors import OptionError

__all__ = ["Group", "Setup", "compile_for", "measure", "runtime_state"]

log = logging.getLogger(__name__)

#: sizes of the inputs that graphs are captured with for counting
_TRACED = (2, 16)
#: graphs that Dynamo may make of one function: several models, plans and lengths share a model's ``forward``
_GRAPHS = 256


@dataclass(frozen=True)
class Group:
    """What is timed.

    Attributes:
        model, target: names.
        length: live tokens of each row.
        batch: rows a call.
        shapes: "dynamic", compiled for all lengths, or "static", for each length by itself.
    """

    model: str
    target: str
    length: int
    batch: int
    shapes: str = "dynamic"

    def __str__(self) -> str:
        return f"{self.model} {self.target} {self.shapes}, {self.batch} x {self.length}"


@dataclass(frozen=True)
class Setup:
    """How it is timed.

    Attributes:
        scorer, stages: of the plans; see `plans.Planner`.
        repeats: calls of each way.
        seconds: begin no further repeat after so long.
        threads: for the runtime to compute with.
    """

    scorer: str = "norm"
    stages: int = 4
    repeats: int = 20
    seconds: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class Pruned:
    """A plan for a budget: tokens at each block, FLOPs of the batch."""

    budget: Fraction
    plan: PrunePlan
    lengths: list[int]
    flops: int


Key = tuple[str, int | Fraction]
Times = Mapping[Key, Sequence[float]]


def measure(
    group: Group, budgets: Sequence[Fraction], setup: Setup, turns: Callable[..., dict[Key, list[float]]] = in_turns
) -> dict[str, Any]:
    """The record of a group, as `results.write` keeps it. Times are in milliseconds a batch.

    Args:
        budgets: shares of the dense model's FLOPs.
        turns: takes the times; see `turns.in_turns`.

    Raises:
        OptionError: the model does not take the length, a budget cannot be met, or the target cannot be measured here.
    """
    shape, target = find_model(group.model), find_target(group.target)
    _check(group, shape, target)
    whole, one = shape.build(), shape.build(blocks=1)
    planner = Planner(whole, inputs(whole, *_TRACED), setup.scorer, setup.stages)
    pruned = [_pruned(planner, budget, group) for budget in budgets]
    dense_flops = planner.counter.total(group.batch, group.length)
    lengths = lengths_to_time(group.length, *(one.lengths for one in pruned))
    with runtime_state(setup.threads):
        ways = _ways(group, setup, target, (whole, one), lengths, pruned)
        log.info("%s: %d ways, %d repeats", group, len(ways), setup.repeats)
        times = turns(ways, setup.repeats, seconds=setup.seconds)
    record = {
        "model": group.model,
        "target": group.target,
        "length": group.length,
        "batch": group.batch,
        "shapes": group.shapes,
        "scorer": setup.scorer,
        "stages": setup.stages,
        "repeats": len(times["whole", group.length]),
        **conditions(target, setup.threads),
        "blocks": planner.blocks,
    }
    return record | _figures(group, times, lengths, pruned, dense_flops)


def compile_for(target: Target, model: nn.Module, plan: PrunePlan, example: Mapping[str, Tensor], how: How) -> Run:
    """The model on the target; a call returns once its work is done, on whatever device."""
    run = target.make(model, plan, example, how)
    if target.device == "cpu":
        return run

    def waited(**arguments: Tensor) -> Any:
        found = run(**arguments)
        torch.accelerator.synchronize()
        return found

    return waited


@contextmanager
def runtime_state(threads: int) -> Iterator[None]:
    """Torch without gradients, with so many threads, and with room for many graphs; nothing compiled is left behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        limits = {"recompile_limit": _GRAPHS, "accumulated_recompile_limit": 4 * _GRAPHS}
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            yield
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
        gc.collect()


def _check(group: Group, shape: Shape, target: Target) -> None:
    if not 2 <= group.length <= shape.longest:
        raise OptionError(
            f"{shape.name} takes 2 to {shape.longest} tokens; a length of {group.length} cannot be timed."
        )
    if group.batch < 1:
        raise OptionError(f"The batch must be at least 1, not {group.batch}.")
    if group.shapes not in ("dynamic", "static"):
        raise OptionError(f"Shapes are dynamic or static, not {group.shapes!r}.")
    if reason := target.why_not():
        raise OptionError(f"Target {group.target} cannot be measured: {reason}.")


def _pruned(planner: Planner, budget: Fraction, group: Group) -> Pruned:
    plan = planner.plan(budget, [group.length])
    flops = planner.pruned(plan).total(group.batch, group.length)
    return Pruned(budget, plan, block_lengths(plan, planner.blocks, group.length), flops)


def _ways(
    group: Group,
    setup: Setup,
    target: Target,
    models: tuple[nn.Module, nn.Module],
    lengths: Sequence[int],
    pruned: Sequence[Pruned],
) -> dict[Key, Callable[[], object]]:
    """The dense models ("whole", "one") at each length, and "pruned" to each budget."""
    how = How(group.shapes == "dynamic", setup.threads)
    none = PrunePlan(())
    ways: dict[Key, Callable[[], object]] = {}
    for name, built in zip(("whole", "one"), models, strict=True):
        model = built.to(target.device, target.dtype)
        run = None
        for n in lengths:
            example = inputs(model, group.batch, n)
            if run is None or not how.dynamic:
                run = compile_for(target, model, none, example, how)
            ways[name, n] = partial(run, **example)
    model = models[0]
    example = inputs(model, group.batch, group.length)
    for way in pruned:
        ways["pruned", way.budget] = partial(compile_for(target, model, way.plan, example, how), **example)
    return ways


# -- figures ---------------------------------------------------------------------------------------------------------


def _figures(
    group: Group, times: Times, lengths: Sequence[int], pruned: Sequence[Pruned], dense_flops: int
) -> dict[str, Any]:
    """The dense times, those of a block by length, and a cell for each budget."""
    by_length = {name: {n: times[name, n] for n in lengths} for name in ("whole", "one")}
    medians = {name: {n: p50(taken) for n, taken in found.items()} for name, found in by_length.items()}
    dense = times["whole", group.length]
    blocks = len(pruned[0].lengths)
    of_block = block_times(medians["whole"], medians["one"], blocks)
    return {
        "dense": summary(dense),
        "outside_blocks": round(medians["one"][group.length] - of_block[group.length], 4),
        "block": {str(n): round(taken, 4) for n, taken in of_block.items()},
        "cells": [_cell(group, way, times, by_length, medians, dense_flops) for way in pruned],
    }


def _cell(
    group: Group,
    way: Pruned,
    times: Times,
    by_length: Mapping[str, Mapping[int, Sequence[float]]],
    medians: Mapping[str, Mapping[int, float]],
    dense_flops: int,
) -> dict[str, Any]:
    """Ratios are those of the medians; their quartiles are over the repeats."""
    dense, taken = times["whole", group.length], times["pruned", way.budget]
    bound = ideal_time(medians["whole"], medians["one"], way.lengths, group.length)
    bounds = ideal_times(by_length["whole"], by_length["one"], way.lengths, group.length)
    flops_ratio = dense_flops / way.flops
    speedup = p50(dense) / p50(taken)
    return {
        "budget": str(way.budget),
        "stages": [stage.to_dict() for stage in way.plan.stages],
        "block_lengths": way.lengths,
        "flops": {"dense": dense_flops, "pruned": way.flops},
        "pruned": summary(taken),
        "ideal": {"p50": round(bound, 4), "p95": round(p95(bounds), 4)},
        "flops_ratio": round(flops_ratio, 4),
        "speedup": round(speedup, 4),
        "speedup_quartiles": _quartiles(dense, taken),
        "ideal_speedup": round(p50(dense) / bound, 4),
        "overhead": round(p50(taken) / bound, 4),
        "overhead_quartiles": _quartiles(taken, bounds),
        "share_of_flops_ratio": round(speedup / flops_ratio, 4),
    }


def _quartiles(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [round(q, 4) for q in quartiles([a / b for a, b in zip(above, below, strict=True)])]
