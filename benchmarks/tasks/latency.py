"""How fast pruned models are against dense ones, and against what pruning could give at most on the same runtime.

Models have random weights and the shapes of well-known ones. All ways of a group (the dense model, one block of it,
each budget) run in one process and in turns, see `benchmarks.timing`; how the ideal is found is told in `ideal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.latency.ideal import block_times, ideal_time, ideal_times, lengths_to_time
from benchmarks.latency.models import MODELS, find_model, inputs
from benchmarks.latency.plans import Planner, block_lengths
from benchmarks.latency.targets import TARGETS, How, compile_for, find_target, runtime_state
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.timing import in_turns, p50, p95, pair, quartile_pair
from prunepass import PrunePlan
from prunepass.errors import OptionError

#: models, targets, lengths and batches that are measured unless told otherwise
PRESETS: dict[str, tuple[Sequence[Any], ...]] = {
    "main": (("bert-base",), ("openvino-f32", "openvino-bf16", "inductor-f32"), (128, 512), (1, 8)),
    "all": (tuple(MODELS), tuple(t for t in TARGETS if t != "eager-f32"), (64, 128, 256, 512, 2048), (1, 8, 32)),
}
COLUMNS = (
    *("tokens x rows", "budget", "dense", "pruned", "ideal", "FLOPs ratio", "speed-up", "ideal speed-up"),
    *("overhead", "reached"),
)
Key = tuple[str, Any]
Turns = Callable[..., Mapping[Key, Sequence[float]]]


@dataclass(frozen=True)
class Timed(Task):
    """What all benchmarks of plans that meet a budget are told alike."""

    budgets: tuple[Fraction, ...] = option(tuple(map(Fraction, ("1/2", "1/4", "1/8"))), "shares of the dense FLOPs")
    scorer: str = option("norm", "norm, random, attention, or mlp with random weights")
    stages: int = option(4, "how many stages a plan has; 0: one before every block")
    repeats: int = option(20, "calls of each way")
    timeout: float | None = option(None, "begin no further repeat of a cell after so many seconds", type=float)
    threads: int = option(torch.get_num_threads, "of every runtime", factory=True)


@dataclass(frozen=True)
class Benchmark(Timed):
    title = "How fast pruned models are"
    introduction = (
        "Models have random weights; every row is full of live tokens. Times are milliseconds a batch: the median "
        "over the repeats, with the 95th percentile in brackets. The **ideal** is what pruning could give at most "
        "on the same runtime: every block as fast as the dense model's own block at the pruned length, and all "
        "else as in the dense model. *Overhead* is pruned over ideal, with the quartiles over the repeats: what "
        "scoring, selecting and putting back cost. *Reached* is the share that the speed-up is of the FLOPs "
        "ratio. Dense, pruned and ideal were timed in turns in one process, each call after others of its own "
        "kind."
    )
    preset: str = option("main", f"what is measured unless told otherwise: {', '.join(PRESETS)}")
    models: tuple[str, ...] = option((), f"of: {', '.join(MODELS)}", type=str)
    targets: tuple[str, ...] = option((), f"of: {', '.join(TARGETS)}", type=str)
    lengths: tuple[int, ...] = option((), "tokens of a row, such as 128,512", type=int)
    batches: tuple[int, ...] = option((), "rows a call, such as 1,8", type=int)
    shapes: str = option("dynamic", "dynamic: compiled for all lengths; static: for each")

    def cells(self) -> Iterator[Cell]:
        if self.preset not in PRESETS:
            raise OptionError(f"There is no preset {self.preset!r}; there are {', '.join(PRESETS)}.")
        asked = (self.models, self.targets, self.lengths, self.batches)
        models, targets, lengths, batches = (a or b for a, b in zip(asked, PRESETS[self.preset], strict=True))
        reasons = {target: find_target(target).why_not() for target in targets}
        for model, target, length, batch in product(models, targets, lengths, batches):
            longest = find_model(model).longest
            fits = None if length <= longest else f"the model takes at most {longest} tokens"
            yield Cell(
                {"model": model, "target": target, "shapes": self.shapes, "length": length, "batch": batch}
                | {"scorer": self.scorer, "stages": self.stages, "threads": self.threads},
                partial(measure, self, model, target, length, batch),
                tuple(map(str, self.budgets)),
                fits or reasons[target],
            )

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        """A section for each model, target, kind of shapes, plan and setting, with a line a cell."""
        names = ("model", "target", "shapes", "scorer", "stages", "threads", "processor")
        sections: dict[tuple[Any, ...], list[Group]] = {}
        for group in sorted(groups, key=lambda g: tuple(str(g.shared[name]) for name in names)):
            sections.setdefault(tuple(group.shared[name] for name in names), []).append(group)
        for found in sections.values():
            ordered = sorted(found, key=lambda g: (g.shared["length"], g.shared["batch"]))
            lines = (_line(group.shared, row) for group in ordered for row in by_budget(group))
            yield f"{_head(ordered)}\n\n{table(COLUMNS, lines)}"


def measure(
    options: Benchmark,
    model: str,
    target_name: str,
    length: int,
    batch: int,
    budgets: Sequence[str],
    turns: Turns = in_turns,
) -> tuple[dict[str, Any], Rows]:
    """Rows by budget, and what they share: the dense times and those of a block by length. Milliseconds a batch.

    Args:
        turns: takes the times; see `benchmarks.timing.in_turns`.

    Raises:
        OptionError: the model does not take the length, a budget cannot be met, or the target cannot be measured here.
    """
    shape, target = find_model(model), find_target(target_name)
    if not 2 <= length <= shape.longest:
        raise OptionError(f"{shape.name} takes 2 to {shape.longest} tokens; a length of {length} cannot be timed.")
    if batch < 1:
        raise OptionError(f"The batch must be at least 1, not {batch}.")
    if options.shapes not in ("dynamic", "static"):
        raise OptionError(f"Shapes are dynamic or static, not {options.shapes!r}.")
    target.check()
    built = {"whole": shape.build(), "one": shape.build(blocks=1)}
    planner = Planner(built["whole"], inputs(built["whole"], 2, 16), options.scorer, options.stages)
    plans = {budget: planner.plan(Fraction(budget), [length]) for budget in budgets}
    kept = {budget: block_lengths(plan, planner.blocks, length) for budget, plan in plans.items()}
    lengths = lengths_to_time(length, *kept.values())
    how, none = How(options.shapes == "dynamic", options.threads), PrunePlan(())
    with runtime_state(options.threads):
        ways: dict[Key, Callable[[], object]] = {}
        for name, dense in built.items():
            moved, call = dense.to(target.device, target.dtype), None
            for n in lengths:
                example = inputs(moved, batch, n)
                if call is None or not how.dynamic:
                    call = compile_for(target, moved, none, example, how)
                ways[name, n] = partial(call, **example)
        example = inputs(built["whole"], batch, length)
        for budget, plan in plans.items():
            ways["pruned", budget] = partial(compile_for(target, built["whole"], plan, example, how), **example)
        times = turns(ways, options.repeats, seconds=options.timeout)
    of = {name: {n: times[name, n] for n in lengths} for name in built}
    medians = {name: {n: p50(taken) for n, taken in found.items()} for name, found in of.items()}
    block = block_times(medians["whole"], medians["one"], planner.blocks)
    shared = {
        **conditions(*target.packages, threads=options.threads, device=target.device),
        "repeats": len(of["whole"][length]),
        "blocks": planner.blocks,
        "dense": pair(of["whole"][length]),
        "dense_flops": planner.counter.total(batch, length),
        "outside_blocks": round(medians["one"][length] - block[length], 4),
        "block": {str(n): round(taken, 4) for n, taken in block.items()},
    }
    return shared, [
        _row(budget, plan, planner.pruned(plan).total(batch, length), kept[budget], length, times, of, medians)
        for budget, plan in plans.items()
    ]


def _row(
    budget: str,
    plan: PrunePlan,
    flops: int,
    kept: Sequence[int],
    length: int,
    times: Mapping[Key, Sequence[float]],
    of: Mapping[str, Mapping[int, Sequence[float]]],
    medians: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """Quartiles are those of the ratios over the repeats; the ratios themselves, of the medians, the page computes."""
    taken = times["pruned", budget]
    bounds = ideal_times(of["whole"], of["one"], kept, length)
    return {
        "budget": budget,
        "plan": stages_text(plan.stages),
        "flops": flops,
        "pruned": pair(taken),
        "ideal": [round(ideal_time(medians["whole"], medians["one"], kept, length), 4), round(p95(bounds), 4)],
        "speedup_quartiles": quartile_pair(of["whole"][length], taken),
        "overhead_quartiles": quartile_pair(taken, bounds),
    }


# -- page ------------------------------------------------------------------------------------------------------------


def _head(groups: Sequence[Group]) -> str:
    first = groups[0].shared
    repeats = sorted({group.shared["repeats"] for group in groups})
    counted = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    return (
        f"## {first['model']}, {first['target']}, {first['shapes']} shapes\n\n"
        f"Scorer {first['scorer']}; {setting(first)}; {counted} repeats."
    )


def _line(shared: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    dense, pruned, ideal = shared["dense"], row["pruned"], row["ideal"]
    flops_ratio, speedup = shared["dense_flops"] / row["flops"], dense[0] / pruned[0]
    low, high = row["overhead_quartiles"]
    return [
        f"{shared['length']} x {shared['batch']}",
        row["budget"],
        *(f"{half:.4g} ({most:.4g})" for half, most in (dense, pruned, ideal)),
        f"{flops_ratio:.2f}x",
        f"{speedup:.2f}x",
        f"{dense[0] / ideal[0]:.2f}x",
        f"{pruned[0] / ideal[0]:.2f} ({low:.2f} to {high:.2f})",
        f"{100 * speedup / flops_ratio:.0f} %",
    ]


def by_budget(group: Group) -> Iterable[dict[str, Any]]:
    """Rows in the order of the largest budget first."""
    return sorted(group.rows, key=lambda row: Fraction(row["budget"]), reverse=True)
