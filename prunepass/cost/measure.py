"""How a latency table is measured: dense and with one stage, in turns, by length."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.cost.blocks import BlockCosts, probe_plan
from prunepass.cost.curve import never_falling
from prunepass.cost.flops import FlopCounter
from prunepass.errors import OptionError
from prunepass.graph.capture import capture_module
from prunepass.pipeline import analyse
from prunepass.plan import PrunePlan, ScorerSpec
from prunepass.plan.annotations import Leave

__all__ = ["Conditions", "Seconds", "Setup", "StageParts", "measure"]

#: longest length that is timed unless the caller asks for more
DEFAULT_MAX_LENGTH = 512
_SHORTEST = 8
#: with it ceil(keep * n) = n for every n below its denominator: a stage that does all its work and drops nothing
_NEARLY_ALL = Fraction(9999, 10000)
_PRECISIONS = ("auto", "f32", "bf16")

Run = Callable[..., Any]


@dataclass(frozen=True)
class Conditions:
    """What a table was measured on. Its seconds mean nothing elsewhere.

    Attributes:
        model: class name of the model.
        dtype: of its parameters.
        precision: what was asked of the runtime; "auto" is its own choice.
        batch: rows a call.
        threads: PyTorch's.
        config: the runtime's settings.
        scorer: whose stage was measured, and ``hidden``, the width of its predictor ("mlp"; None for the model's own).
        positions: whether the predictor looks at places.
        lens: rank of the stage's lens; 0 for none.
        leave: how tokens leave at the stage.
        repeats: timings that each median is of.
        versions: of the packages that took part.
        processor: as the operating system names it.
    """

    model: str
    target: str
    dtype: str
    precision: str
    batch: int
    threads: int
    config: Mapping[str, Any]
    scorer: Any
    hidden: int | None
    repeats: int
    versions: Mapping[str, str]
    processor: str
    lens: int = 0
    positions: bool = False
    leave: Leave = "drop"


@dataclass(frozen=True)
class Seconds:
    """What was measured; see `LatencyTable`."""

    lengths: tuple[int, ...]
    blocks: tuple[tuple[float, ...], ...]
    outside: tuple[float, ...]
    stages: tuple[float, ...]
    conditions: Conditions


@dataclass(frozen=True)
class StageParts:
    """What a stage holds, see `BlockCosts.of`; and how tokens leave at it."""

    scorer: ScorerSpec
    hidden: int | None = None
    lens: int = 0
    positions: bool = False
    leave: Leave = "drop"


@dataclass(frozen=True)
class Setup:
    """How to measure; see `LatencyTable.measure`.

    Raises:
        OptionError: a size below 1, or a precision that the target cannot set.
    """

    target: str
    batch: int
    precision: str
    stage: StageParts
    repeats: int
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.batch < 1 or self.repeats < 1:
            raise OptionError(
                f"A latency table needs at least 1 row and 1 repeat, not {self.batch} and {self.repeats}."
            )
        if self.precision not in _PRECISIONS:
            raise OptionError(f"precision must be one of {', '.join(_PRECISIONS)}, not {self.precision!r}.")
        if self.precision != "auto" and self.target != "openvino":
            raise OptionError(
                f"Target {self.target!r} computes in the model's own dtype, so precision={self.precision!r} cannot be "
                "set. Load the model in that dtype and leave precision out."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What the runtime is told."""
        hint = {} if self.precision == "auto" else {"INFERENCE_PRECISION_HINT": self.precision}
        return {**self.config, **hint}

    def compiled(self, model: nn.Module, plan: PrunePlan) -> Run:
        """The model on the target, with lengths open from the first call on."""
        options: dict[str, Any] = {"plan": plan, "target": self.target}
        if self.settings:
            options["config"] = self.settings
        run: Run = torch.compile(model, backend="tokprune", dynamic=True, options=options)
        return run

    def conditions(self, model: nn.Module) -> Conditions:
        """What `LatencyTable.conditions` says."""
        return Conditions(
            model=type(model).__name__,
            target=self.target,
            dtype=str(next(p.dtype for p in model.parameters())).removeprefix("torch."),
            precision=self.precision,
            batch=self.batch,
            threads=torch.get_num_threads(),
            config=self.settings,
            scorer=self.stage.scorer.to_json(),
            hidden=self.stage.hidden,
            lens=self.stage.lens,
            positions=self.stage.positions,
            leave=self.stage.leave,
            repeats=self.repeats,
            versions=_versions("prunepass", "torch", "transformers", self.target),
            processor=platform.processor() or platform.machine(),
        )


def measure(
    model: nn.Module,
    example: Mapping[str, Any],
    setup: Setup,
    lengths: Sequence[int] | None,
    max_length: int | None,
    on_step: Callable[[str], None],
) -> Seconds:
    """See `LatencyTable.measure`."""
    _check_sizes(lengths, max_length)
    captured = capture_module(model, example)
    grid = _grid(lengths, max_length, _longest(model, captured.graph_module))
    stage = setup.stage
    costs = BlockCosts.of(captured, scorer=stage.scorer, hidden=stage.hidden)
    plan = probe_plan(analyse(captured.graph_module)[2], keep=_NEARLY_ALL, **vars(stage))
    runs = [setup.compiled(model, p) for p in (PrunePlan(()), plan)]
    batches = [_resized(example, setup.batch, n) for n in grid]
    with torch.no_grad():
        dense, staged = _time(runs, batches, setup.repeats, on_step)
    return _table(costs, grid, dense, staged, setup, model)


def _table(
    costs: BlockCosts,
    grid: Sequence[int],
    dense: Sequence[float],
    staged: Sequence[float],
    setup: Setup,
    model: nn.Module,
) -> Seconds:
    """Seconds of a batch, dense and with one stage, as seconds a row of the parts."""
    whole = torch.tensor(never_falling(dense), dtype=torch.float64) / setup.batch
    extra = never_falling([max(0.0, s - d) / setup.batch for s, d in zip(staged, dense, strict=True)])
    n = torch.tensor(grid, dtype=torch.float64)
    flops = torch.stack([*(costs.at(i, n) for i in range(costs.num_blocks)), costs.rest(n)])
    *blocks, outside = (flops / flops.sum(0) * whole).tolist()
    return Seconds(
        lengths=tuple(grid),
        blocks=tuple(never_falling(block) for block in blocks),
        outside=tuple(outside),
        stages=extra,
        conditions=setup.conditions(model),
    )


def _time(
    runs: Sequence[Run], batches: Sequence[Mapping[str, Any]], repeats: int, on_step: Callable[[str], None]
) -> list[list[float]]:
    """Median seconds, for each run a list over the batches. Who goes first changes from one repeat to the next."""
    for batch in batches:
        for run in runs:
            _seconds(run, batch)
        on_step("compiling")
    times: list[list[list[float]]] = [[[] for _ in batches] for _ in runs]
    for repeat in range(repeats):
        turns = range(len(runs))[:: 1 if repeat % 2 else -1]
        for i, batch in enumerate(batches):
            for which in turns:
                times[which][i].append(_seconds(runs[which], batch))
            on_step("timing")
    return [[statistics.median(t) for t in of_run] for of_run in times]


def _seconds(run: Run, batch: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    run(**batch)
    if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in batch.values()):
        torch.accelerator.synchronize()
    return time.perf_counter() - start


# -- sizes ---------------------------------------------------------------------------------------------------------


def _check_sizes(lengths: Sequence[int] | None, max_length: int | None) -> None:
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise OptionError(f"lengths must be token counts of at least 1, not {list(lengths)}.")
    if max_length is not None and max_length < 1:
        raise OptionError(f"max_length must be at least 1, not {max_length}.")


def _grid(lengths: Sequence[int] | None, max_length: int | None, longest: int | None) -> list[int]:
    """The lengths asked for, else steps up to the maximum; all within the ``longest`` that the model takes."""
    maximum = max_length or min(longest or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    grid = sorted({*_steps(maximum), maximum} if lengths is None else set(lengths))
    if longest is not None and grid[-1] > longest:
        raise OptionError(f"The model takes at most {longest} tokens; a length of {grid[-1]} cannot be timed.")
    return grid


def _steps(maximum: int) -> list[int]:
    """8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, ...: doubles, and from 256 on the halves between."""
    doubles = takewhile(lambda n: n <= maximum, (_SHORTEST << i for i in count()))
    steps = {n for double in doubles for n in (double, double * 3 // 2 if double >= 256 else double)}
    return [n for n in sorted(steps) if n <= maximum]


def _longest(model: nn.Module, graph_module: Any) -> int | None:
    bounds = [
        FlopCounter(graph_module).max_length,
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
    ]
    stated = [n for n in bounds if isinstance(n, int) and n > 0]
    return min(stated) if stated else None


def _resized(example: Mapping[str, Any], batch: int, length: int) -> dict[str, Any]:
    """The example's rows and tokens, repeated or cut to [batch, length], and all of them live."""
    sized = {name: _repeated(value, batch, length) for name, value in example.items()}
    if isinstance(mask := sized.get("attention_mask"), Tensor):
        sized["attention_mask"] = torch.ones_like(mask)
    return sized


def _repeated(value: Any, *sizes: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    for axis, size in enumerate(sizes[: value.dim()]):
        value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
    return value.contiguous()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a target that is no package of its own, or the model's library
            continue
    return found
