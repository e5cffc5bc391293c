"""Dense and pruned, in turn, on one target: latency, FLOPs, and how far the outputs agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import prunepass
from prunepass.errors import OptionError, PlanError, RefusalError, option
from prunepass.plan import PrunePlan
from prunepass.plan.choice import AnyPlan
from prunepass.report.data import AgreementRow, Measured
from prunepass.report.precision import computes_in
from prunepass.report.report import Report

__all__ = ["Agreement", "BatchTiming", "BenchResult", "Timing", "bench"]

Batch = Mapping[str, Tensor]
#: cosine to the dense model's output from which on a pruned one is not remarked on
ENOUGH = 0.9
#: outputs of shape [batch, length] that hold one number a token
_PER_TOKEN_LOGITS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Timing:
    """Latency of one batch in milliseconds, over all batches and repeats; ``texts_per_second`` from their sum."""

    p50: float
    p95: float
    texts_per_second: float

    @classmethod
    def of(cls, milliseconds: Sequence[float], texts: int) -> Timing:
        """The figures of single batches' times, which together held ``texts`` texts."""
        ordered = sorted(milliseconds)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return cls(statistics.median(ordered), p95, 1000 * texts / sum(ordered))


@dataclass(frozen=True)
class Agreement:
    """How one output of the pruned model compares with the dense model's.

    Attributes:
        cosine: mean cosine similarity of the output's vectors; of an output with a sequence axis, at the live tokens,
            less those that ``restore="zeros"`` left empty.
        pooled_cosine: the same after averaging over each row's tokens; None where the output has no sequence axis.
        max_difference: largest absolute difference of two numbers.
    """

    output: str
    cosine: float
    pooled_cosine: float | None
    max_difference: float


@dataclass(frozen=True)
class BatchTiming:
    """One batch: tokens of a row, padding included, and the median milliseconds of both models."""

    length: int
    dense: float
    pruned: float


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured.

    Attributes:
        speedup: ratio of the medians, dense over pruned.
        by_batch: the same for each batch, in the order given.
        slower_up_to: the length up to which the batches, taken together, lose time by pruning; None where they gain.
        plan, plan_source: what was timed, and where it is from.
        precision: what the target computes in, and what decides that.
        warnings: of the plan on these batches, as `prunepass.explain` has them.
    """

    target: str
    batches: int
    texts: int
    tokens: int
    repeats: int
    threads: int
    dense: Timing
    pruned: Timing
    speedup: float
    by_batch: tuple[BatchTiming, ...]
    slower_up_to: int | None
    flops_ratio: Mapping[str, float]
    agreement: tuple[Agreement, ...]
    plan: PrunePlan = field(default_factory=lambda: PrunePlan(()))
    plan_source: str = ""
    precision: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and strings, for JSON."""
        return {f.name: asdict(self)[f.name] for f in fields(self) if f.name != "plan"} | {"plan": self.plan.to_dict()}

    def added_to(self, report: Report) -> Report:
        """``report`` with these figures, which its page then shows first."""
        agreement = tuple(AgreementRow(row.output, row.cosine, row.pooled_cosine) for row in self.agreement)
        taken = Measured(
            self.target, self.precision, self.texts, self.dense.p50, self.pruned.p50, self.speedup, agreement
        )
        return replace(report, measured=taken)

    @property
    def advice(self) -> str | None:
        """What to try where an output of the pruned model is far from the dense one's; None where none is."""
        low = min(self.agreement, key=_closeness, default=None)
        if low is None or _closeness(low) >= ENOUGH:
            return None
        what = "the mean of its tokens" if low.pooled_cosine is not None else "its vectors"
        restore = f"{option('restore', 'mean')}, " if low.pooled_cosine is not None and self._is_stale else ""
        return (
            f"{low.output} is far from the dense model's: the cosine of {what} is {_closeness(low):.2f}. Try {restore}"
            "a larger keep, later layers, or a trained plan (prunepass train)."
        )

    @property
    def _is_stale(self) -> bool:
        return self.plan.restore == "last"


def _closeness(row: Agreement) -> float:
    return row.cosine if row.pooled_cosine is None else row.pooled_cosine


def bench(
    model: nn.Module,
    plan: AnyPlan,
    batches: Sequence[Batch],
    *,
    target: str = "inductor",
    repeats: int = 10,
    config: Mapping[str, Any] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> BenchResult:
    """Run ``batches`` dense and pruned, in turn, through ``torch.compile(backend="tokprune")`` on one target.

    Both go through the same lowering: the dense one is the same call with an empty plan. Every batch is run once
    before anything is timed, so that compiling is not.

    Args:
        plan: as `prunepass.prune` takes it.
        batches: keyword arguments of the model: ``input_ids`` and ``attention_mask`` int64 [B, S], and so on.
        config: the runtime's own settings, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.
        on_step: called with a word on what runs, ``len(batches) * (repeats + 1)`` times.

    Raises:
        OptionError: no batches, or fewer than one repeat.
        PruneError: whatever the plan or the target is refused for.
    """
    if not batches or repeats < 1:
        raise OptionError(f"bench needs at least 1 batch and 1 repeat, not {len(batches)} and {repeats}.")
    report = on_step or (lambda _: None)
    explained = prunepass.explain(model, plan, dict(batches[0]), lengths=_lengths(batches))
    for refusal in explained.refusals:
        if refusal.fault == "plan":
            raise PlanError(refusal.reason)
        raise RefusalError(refusal.reason, where=refusal.where, hint=refusal.hint)
    chosen = explained.plan
    runs = [_compiled(model, p, target, config) for p in (PrunePlan(()), chosen)]
    with torch.no_grad():
        compared = _compare(runs, batches, report)
        times = _time(runs, batches, repeats, report)
    texts = sum(len(_ids(batch)) for batch in batches)
    dense, pruned = (Timing.of([t for taken in of for t in taken], texts * repeats) for of in times)
    by_batch = tuple(
        BatchTiming(int(_ids(batch).shape[1]), *map(statistics.median, of))
        for batch, *of in zip(batches, *times, strict=True)
    )
    return BenchResult(
        target=target,
        batches=len(batches),
        texts=texts,
        tokens=sum(_lengths(batches)),
        repeats=repeats,
        threads=torch.get_num_threads(),
        dense=dense,
        pruned=pruned,
        speedup=dense.p50 / pruned.p50,
        by_batch=by_batch,
        slower_up_to=_slower_up_to(by_batch),
        flops_ratio=_flops_ratio(explained),
        agreement=compared,
        plan=chosen,
        plan_source=explained.plan_source,
        precision=computes_in(target, model, config),
        warnings=explained.warnings,
    )


def _compiled(model: nn.Module, plan: PrunePlan, target: str, config: Mapping[str, Any] | None) -> Callable[..., Any]:
    options: dict[str, Any] = {"plan": plan, "target": target}
    if config:
        options["config"] = dict(config)
    return torch.compile(model, backend="tokprune", options=options)


def _time(
    runs: Sequence[Callable[..., Any]], batches: Sequence[Batch], repeats: int, report: Callable[[str], None]
) -> tuple[list[list[float]], ...]:
    """Milliseconds of each run, by batch and repeat; who goes first changes every time, so that neither always finds
    warm caches."""
    times: tuple[list[list[float]], ...] = tuple([[] for _ in batches] for _ in runs)
    for repeat in range(repeats):
        for i, batch in enumerate(batches):
            for which in (0, 1) if (repeat + i) % 2 else (1, 0):
                start = time.perf_counter()
                runs[which](**batch)
                times[which][i].append(1000 * (time.perf_counter() - start))
            report("timing")
    return times


def _slower_up_to(timings: Sequence[BatchTiming]) -> int | None:
    """The greatest length such that the batches no longer than that take longer pruned than dense, all in all."""
    found, gained = None, 0.0
    by_length = attrgetter("length")
    for length, group in groupby(sorted(timings, key=by_length), key=by_length):
        gained += sum(timing.dense - timing.pruned for timing in group)
        if gained < 0:
            found = length
    return found


def _compare(
    runs: Sequence[Callable[..., Any]], batches: Sequence[Batch], report: Callable[[str], None]
) -> tuple[Agreement, ...]:
    found: dict[str, list[Agreement]] = {}
    for batch in batches:
        dense, pruned = (dict(_named(run(**batch))) for run in runs)
        for name, value in dense.items():
            found.setdefault(name, []).append(_agreement(name, value, pruned[name], _mask(batch)))
        report("compiling")
    return tuple(_mean(parts) for parts in found.values())


def _agreement(name: str, dense: Tensor, pruned: Tensor, mask: Tensor) -> Agreement:
    dense, pruned = dense.double(), pruned.double()
    if name in _PER_TOKEN_LOGITS:
        dense, pruned = dense * mask, pruned * mask
    if dense.ndim < 3:
        cosine = cosine_similarity(dense, pruned, dim=-1).mean()
        return Agreement(name, float(cosine), None, float((dense - pruned).abs().max()))
    live = mask.bool() & (pruned != 0).any(dim=-1)
    cosine = cosine_similarity(dense[live], pruned[live], dim=-1).mean()
    pooled = cosine_similarity(_pooled(dense, mask), _pooled(pruned, mask), dim=-1).mean()
    return Agreement(name, float(cosine), float(pooled), float((dense[live] - pruned[live]).abs().max()))


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _mean(parts: Sequence[Agreement]) -> Agreement:
    pooled = [p.pooled_cosine for p in parts if p.pooled_cosine is not None]
    return Agreement(
        parts[0].output,
        statistics.fmean(p.cosine for p in parts),
        statistics.fmean(pooled) if pooled else None,
        max(p.max_difference for p in parts),
    )


def _named(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output, by name (or by place, where it has none)."""
    if isinstance(output, Tensor):
        output = (output,)
    items = output.items() if isinstance(output, Mapping) else ((str(i), v) for i, v in enumerate(output))
    for name, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield name, value


def _flops_ratio(report: Report) -> dict[str, float]:
    return dict(report.flops.dense.over(report.flops.pruned)) if report.flops and not report.refusals else {}


def _lengths(batches: Sequence[Batch]) -> list[int]:
    return [int(n) for batch in batches for n in _mask(batch).sum(1)]


def _mask(batch: Batch) -> Tensor:
    return batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(_ids(batch))


def _ids(batch: Batch) -> Tensor:
    return batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0].long()
