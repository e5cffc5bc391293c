"""What ``prunepass eval`` does: plans on rows with labels, beside what they must beat, in score, FLOPs and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import prunepass
from prunepass.backends._options import pairs
from prunepass.cost.flops import FlopCounter
from prunepass.errors import PlanError, RefusalError
from prunepass.graph.capture import capture_module
from prunepass.plan import PrunePlan, ScorerSpec
from prunepass.report.precision import computes_in
from prunepass.report.report import Report
from prunepass.scorers.lens import PREFIX
from prunepass.training.data.features import Features, build_dataset
from prunepass.training.data.options import EvalOptions
from prunepass.training.loop.evaluate import METHOD, WHOLE_TEXT, Evaluation, Interval, Scored, intervals, longest_of
from prunepass.training.loop.prepare import ReadyToTry
from prunepass.training.loop.progress import Progress, Silent
from prunepass.training.loop.quantised import CALIBRATION, Quantised
from prunepass.training.loop.record import versions

__all__ = ["CUT", "DENSE", "DISTANCE", "PLAN", "RANDOM", "Entry", "Trial", "evaluate"]

DENSE, CUT, RANDOM, PLAN = "dense", "cut", "random", "plan"
#: of the mean distance from the dense model's answers, where there are no labels
DISTANCE = "distance"
#: figures whose names are no words
_SCORES = {"exact": "exact matches", "f1": "F1", "spearman": "Spearman's rank correlation"}
#: times as fast as dense from which on a plan is worth a change
_WORTH = 1.1
#: points of the score that count as kept
_KEPT = 1.0


@dataclass(frozen=True)
class Entry:
    """One model on all rows.

    Attributes:
        name: of it, for people.
        kind: "dense"; "plan"; or what a plan must beat: "cut", texts cut until the dense model costs as much, and
            "random", the same plan with tokens drawn by lot.
        of: name of the plan that it is there for; that of a plan is its own.
        plan: None for the dense model.
        figures: metrics on all rows.
        intervals: of each figure, at 95 %.
        changes: the same of its difference from the dense model's.
        flops: share of the dense model's FLOPs on the rows' real tokens, scoring included.
        milliseconds: of one call, median over repeats of the mean over calls; None where it was not timed.
        speedup: how many times as fast as the dense model, median and quartiles over repeats.
        tokens: that texts were cut to.
    """

    name: str
    kind: str
    of: str
    plan: PrunePlan | None
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    changes: Mapping[str, Interval]
    flops: float
    milliseconds: float | None = None
    speedup: tuple[float, float, float] | None = None
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without weights."""
        return vars(self) | {"plan": None if self.plan is None else self.plan.to_dict()}


@dataclass(frozen=True)
class Trial:
    """All models on one set of rows.

    Attributes:
        headline: the figure that counts, by name; the larger the better, but for "distance".
        entries: the dense model first, then each plan after what it must beat.
        warnings: of the plans on these rows, as `prunepass.explain` has them.
        details: rows, target, precision, threads, versions and seeds.
    """

    headline: str
    entries: tuple[Entry, ...]
    warnings: tuple[str, ...]
    details: Mapping[str, Any]

    @property
    def verdicts(self) -> list[str]:
        """A sentence or two on each plan: whether it is worth it, on these rows and this machine."""
        return [self._verdict(entry) for entry in self.entries if entry.kind == PLAN]

    def lost(self, entry: Entry) -> float:
        """By how much the headline figure is worse than the dense model's: in points (hundredths) of a score, or in
        hundredths of the distance."""
        sign = -1 if self.headline == DISTANCE else 1
        return 100 * sign * (self.entries[0].figures[self.headline] - entry.figures[self.headline])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "headline": self.headline,
            "entries": [entry.to_dict() for entry in self.entries],
            "verdicts": self.verdicts,
            "warnings": list(self.warnings),
            **self.details,
        }

    def _verdict(self, entry: Entry) -> str:
        beaten = {e.kind: e for e in self.entries if e.of == entry.name and e.kind != PLAN}
        lost = self.lost(entry)
        said = f"{entry.name}: {self._gain(entry)} and {self._loss(entry)}."
        gain = entry.speedup[0] if entry.speedup is not None else 1 / entry.flops if entry.flops else float("inf")
        cut, drawn = beaten.get(CUT), beaten.get(RANDOM)
        if gain < _WORTH:
            return f"{said} Not worth it: hardly faster. Longer texts, larger batches or a smaller keep gain more."
        if cut is not None and self.lost(cut) <= lost:
            return (
                f"{said} Not worth it: texts cut to {cut.tokens} tokens cost the dense model as much and "
                f"{self._amount(cut)}."
            )
        if drawn is not None and self.lost(drawn) <= lost:
            return f"{said} The choice of tokens gains nothing: tokens drawn by lot {self._amount(drawn)}."
        rivals = [f"cut texts {self._amount(cut)}"] if cut is not None else []
        rivals += [f"tokens drawn by lot {self._amount(drawn)}"] if drawn is not None else []
        compared = f" At the same FLOPs {' and '.join(rivals)}." if rivals else ""
        if lost <= _KEPT:
            return f"{said} Worth it.{compared}{self._doubt(entry)}"
        return f"{said} Faster, at a price.{compared} Training (prunepass train) or a larger keep loses less."

    @property
    def _score(self) -> str:
        return _SCORES.get(self.headline, self.headline)

    def _amount(self, entry: Entry) -> str:
        if self.headline == DISTANCE:
            return f"are {entry.figures[DISTANCE]:.4f} away"
        lost = self.lost(entry)
        return f"lose {lost:.1f} points" if lost >= 0 else f"gain {-lost:.1f} points"

    def _doubt(self, entry: Entry) -> str:
        """Where the interval lets a loss through that would count."""
        low = entry.changes.get(self.headline, (0.0, 0.0))[0]
        if self.headline == DISTANCE or not 100 * low < -2 * _KEPT:
            return ""
        rows = f"{self.details['rows']:,} rows"
        return f" {rows} do not rule out a loss of {-100 * low:.1f} points: give more, if there are any."

    def _gain(self, entry: Entry) -> str:
        flops = f"{entry.flops:.0%} of the FLOPs"
        if entry.speedup is None:
            return flops
        return f"{entry.speedup[0]:.2f} times as fast on {self.details['target']}, {flops}"

    def _loss(self, entry: Entry) -> str:
        lost = self.lost(entry)
        what = f"{abs(lost):.1f} points of {self._score}"
        change = (
            f"{what} lost"
            if lost >= 0.05
            else f"{what} gained"
            if lost <= -0.05
            else f"no points of {self._score} lost"
        )
        if self.headline == DISTANCE:
            change = f"{entry.figures[DISTANCE]:.4f} away from the dense model's answers"
        low, high = (100 * x for x in entry.changes.get(self.headline, (float("nan"),) * 2))
        shown = "" if np.isnan(low) or self.headline == DISTANCE else f" (difference {low:+.1f} to {high:+.1f})"
        return change + shown


@dataclass(frozen=True)
class _Way:
    """What is run: a model, on rows.

    Attributes:
        compiled: for the target.
    """

    entry: Entry
    model: nn.Module
    rows: Features
    compiled: Callable[..., Any]


def evaluate(
    options: EvalOptions, ready: ReadyToTry, progress: Progress | None = None, *, rivals: bool = True
) -> Trial:
    """Score and time the dense model and all plans; nothing is written.

    Scores are computed by PyTorch in the weights' dtype, or on the target; time is that of the target.

    Args:
        rivals: whether what plans must beat is tried as well.

    Raises:
        PlanError: a plan does not fit the model.
        CaptureError, RefusalError: the model cannot be pruned.
        PruneError: the target refuses it.
    """
    progress = progress or Silent()
    trial = _Trial(options, ready)
    ways = list(trial.ways(rivals))
    progress.begin("scoring", len(ways))
    scored = {}  # by number: a plan may have any name
    for i, way in enumerate(ways):
        scored[str(i)] = trial.score(way)
        progress.step(f"scoring: {way.entry.name}")
    progress.end()
    timed = trial.time(ways, progress) if options.timed else {}
    labelled = all(one.labels is not None for one in scored.values())
    headline = ready.head.headline if labelled and ready.head.headline else DISTANCE
    spread = intervals(ready.head, scored, base="0")
    entries = []
    for i, way in enumerate(ways):
        found: dict[str, Any] = {"figures": scored[str(i)].figures, "intervals": spread.get(str(i), {})}
        found["changes"] = spread.get(f"{i} - 0", {})
        entries.append(replace(way.entry, **found, **timed.get(i, {})))
    return Trial(headline, tuple(entries), tuple(dict.fromkeys(trial.warnings)), trial.details())


class _Trial:
    def __init__(self, options: EvalOptions, ready: ReadyToTry) -> None:
        self._options, self._ready = options, ready
        self._dense = ready.loaded.model
        self._example = self._inputs([0, len(ready.rows) - 1])
        self.warnings: list[str] = []

    def details(self) -> dict[str, Any]:
        options, rows = self._options, self._ready.rows
        timed: dict[str, Any] = {
            "repeats": options.repeats,
            "calls": min(options.timed, len(rows)),
            "threads": torch.get_num_threads(),
        }
        timed["precision"] = computes_in(options.target, self._dense, pairs(options.config))
        if options.int8:
            timed["precision"] = f"int8, what is not quantised in {timed['precision']}"
        return {
            "model": options.model,
            "data": self._ready.source.name,
            "rows": len(rows),
            "tokens": sum(rows.lengths),
            "max_length": rows.max_length,
            "cut": rows.cut,
            "seed": options.seed,
            "target": options.target if options.timed or options.deployed else None,
            "config": pairs(options.config),
            "deployed": options.deployed,
            "int8": options.int8,
            **(timed if options.timed else {}),
            "interval_method": METHOD,
            "versions": versions(),
        }

    # -- what is compared --------------------------------------------------------------------------------------------

    def ways(self, rivals: bool) -> Iterator[_Way]:
        """The dense model, then of each plan what it must beat and itself."""
        ready, dense = self._ready, self._compiled(self._dense, PrunePlan(()))
        yield _Way(Entry(DENSE, DENSE, DENSE, None, {}, {}, {}, 1.0), self._dense, ready.rows, dense)
        for candidate in ready.candidates:
            model = self._dense if candidate.model is None else candidate.model
            report = self._explained(model, candidate.choice)
            assert report.flops is not None
            share = report.flops.pruned.real_tokens / report.flops.dense.real_tokens
            entry = Entry(candidate.name, PLAN, candidate.name, report.plan, {}, {}, {}, share)
            if rivals and (cut := self._cut(share)) is not None:
                name = f"text cut to {cut.max_length} tokens"
                other = replace(entry, name=f"{name} ({candidate.name})", kind=CUT, plan=None, tokens=cut.max_length)
                yield _Way(other, self._dense, cut, dense)
            if rivals and (drawn := by_lot(report.plan, self._options.seed)) != report.plan:
                other = replace(entry, name=f"random tokens ({candidate.name})", kind=RANDOM, plan=drawn)
                other = replace(other, flops=self._share(model, drawn))
                yield self._pruned(other, model, drawn)
            yield self._pruned(entry, model, report.plan)

    def _pruned(self, entry: Entry, model: nn.Module, plan: PrunePlan) -> _Way:
        compiled = self._compiled(model, plan)
        pruned = model if self._options.deployed else prunepass.prune(model, plan, self._example)
        return _Way(entry, pruned, self._ready.rows, compiled)

    def _explained(self, model: nn.Module, choice: Any) -> Report:
        report = prunepass.explain(model, choice, self._example, lengths=self._ready.rows.lengths)
        for refusal in report.refusals:
            if refusal.fault == "plan":
                raise PlanError(refusal.reason)
            raise RefusalError(refusal.reason, where=refusal.where, hint=refusal.hint)
        self.warnings += report.warnings
        return report

    def _share(self, model: nn.Module, plan: PrunePlan) -> float:
        report = prunepass.explain(model, plan, self._example, lengths=self._ready.rows.lengths)
        assert report.flops is not None
        return report.flops.pruned.real_tokens / report.flops.dense.real_tokens

    def _cut(self, share: float) -> Features | None:
        """The rows, cut until the dense model costs ``share`` of what it does on whole ones; None where the head does
        not read a text as a whole, or nothing would be left of it."""
        ready = self._ready
        if ready.head.kind not in WHOLE_TEXT or share >= 1:
            return None
        least = ready.loaded.tokenizer.num_special_tokens_to_add(pair=ready.source.rows[0].pair is not None) + 1
        length = longest_of(self._flops, ready.rows.lengths, share)
        if length < least:
            return None
        return build_dataset(ready.source, ready.loaded.tokenizer, ready.head, max_length=length, warns=False)

    @cached_property
    def _flops(self) -> Callable[[int], int]:
        """Of one row of the dense model, by its length."""
        return partial(FlopCounter(capture_module(self._dense, self._example).graph_module).total, 1)

    # -- score -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, way: _Way) -> Scored:
        ready = self._ready
        device = next(self._dense.parameters()).device
        name = "loss" if ready.source.labelled else DISTANCE
        evaluation = Evaluation(
            ready.head, ready.collator, self._options.batch_size, device, nullcontext, ready.source.labelled, name
        )
        model: Any = way.compiled if self._options.deployed else way.model
        return evaluation.of(model, way.rows, self._dense, ready.rows)

    # -- time --------------------------------------------------------------------------------------------------------

    def _compiled(self, model: nn.Module, plan: PrunePlan) -> Callable[..., Any]:
        if self._options.int8:
            return Quantised(model, plan, ranges(self._ready), self._example, pairs(self._options.config))
        options: dict[str, Any] = {"plan": plan, "target": self._options.target}
        if self._options.config:
            options["config"] = pairs(self._options.config)
        return torch.compile(model, backend="tokprune", options=options)

    @torch.no_grad()
    def time(self, ways: Sequence[_Way], progress: Progress) -> dict[int, dict[str, Any]]:
        """Milliseconds and speed-ups of all that is timed, in turns, on texts of all lengths, one a call."""
        options, ready = self._options, self._ready
        order = sorted(range(len(ready.rows)), key=lambda i: len(ready.rows[i]["input_ids"]))
        count = min(options.timed, len(order))
        places = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
        runs = {i: (way.compiled, way.rows) for i, way in enumerate(ways) if way.entry.kind != RANDOM}
        progress.begin("compiling", len(runs) + options.repeats)
        for name, (run, rows) in runs.items():
            for place in places:
                run(**self._inputs([place], rows))
            progress.step(f"compiling: {ways[name].entry.name}")
        totals: dict[int, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for repeat in range(options.repeats):
            spent = dict.fromkeys(names, 0.0)
            for turn, place in enumerate(places):
                first = (repeat + turn) % len(names)  # nobody always finds warm caches
                for name in names[first:] + names[:first]:
                    run, rows = runs[name]
                    batch = self._inputs([place], rows)
                    start = time.perf_counter()
                    run(**batch)
                    spent[name] += time.perf_counter() - start
            for name in names:
                totals[name].append(spent[name])
            progress.step("timing")
        progress.end()
        return {name: _timing(of, totals[0], count) for name, of in totals.items()}

    def _inputs(self, places: Sequence[int], rows: Features | None = None) -> dict[str, Tensor]:
        rows = self._ready.rows if rows is None else rows
        batch = self._ready.collator([dict(rows[i]) for i in places])
        device = next(self._dense.parameters()).device
        return self._ready.head.model_inputs({name: value.to(device) for name, value in batch.items()})


def _timing(seconds: Sequence[float], dense: Sequence[float], calls: int) -> dict[str, Any]:
    ratios = [d / s for d, s in zip(dense, seconds, strict=True)]
    low, high = (float(q) for q in np.percentile(ratios, [25, 75]))
    return {
        "milliseconds": 1000 * statistics.median(seconds) / calls,
        "speedup": (statistics.median(ratios), low, high),
    }


def ranges(ready: ReadyToTry) -> list[dict[str, Tensor]]:
    """The model's inputs of some rows of all lengths, one row each: what int8 measures its ranges on."""
    order = sorted(range(len(ready.rows)), key=lambda i: len(ready.rows[i]["input_ids"]))
    count = min(CALIBRATION, len(order))
    places = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    return [ready.head.model_inputs(ready.collator([dict(ready.rows[place])])) for place in places]


def by_lot(plan: PrunePlan, seed: int = 0) -> PrunePlan:
    """The same stages, with tokens drawn by lot; lenses stay."""
    stages = tuple(replace(stage, scorer=None) for stage in plan.stages)
    lenses = {name: value for name, value in plan.weights.items() if name.split(".", 2)[-1].startswith(PREFIX)}
    return replace(plan, stages=stages, scorer=ScorerSpec("random", (("seed", seed),)), weights=lenses)
