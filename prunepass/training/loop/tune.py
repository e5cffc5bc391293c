"""What ``prunepass tune`` does: tries plans, targets and precisions, and takes the fastest that loses little.

Rows are split: on one half plans are searched for and chosen, the other half says how the one that was chosen does.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunepass.errors import OptionError, option
from prunepass.plan import PrunePlan
from prunepass.plan.choice import choose
from prunepass.plan.files import PLAN_FILE
from prunepass.training.data.features import build_dataset
from prunepass.training.data.options import EvalOptions, Goal, SearchOptions, TrainOptions
from prunepass.training.data.rows import Examples
from prunepass.training.data.tuning import TuneOptions
from prunepass.training.loop.output import check_free, clear_checkpoints, last_checkpoint, new_folder
from prunepass.training.loop.prepare import (
    Candidate,
    ReadyToSearch,
    ReadyToTry,
    own_model,
    prepare_training,
    prepare_trial,
)
from prunepass.training.loop.progress import Progress, Silent, Stop
from prunepass.training.loop.recipe import search, train
from prunepass.training.loop.settings import Setting, settings_of, targets
from prunepass.training.loop.trial import DENSE, PLAN, Entry, Trial, evaluate, ranges

__all__ = ["Tried", "Tuned", "clear_work", "prepare_tuning", "tune", "work_of"]

#: plans of the fewest FLOPs that are timed on each target
_TIMED = 3


@dataclass(frozen=True)
class Tried:
    """One plan on one target, on the rows that are chosen by.

    Attributes:
        entry: score, FLOPs and time; the dense model's where ``entry.kind`` is "dense".
        lost: points of the headline figure that it loses against the dense model in PyTorch, so that what a target's
            precision loses counts; hundredths of the distance, where there are no labels.
    """

    setting: Setting
    entry: Entry
    lost: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**self.setting.to_dict(), "lost": self.lost, **self.entry.to_dict()}


@dataclass(frozen=True)
class Tuned:
    """What tuning ends with.

    Attributes:
        best: the fastest that loses no more than allowed.
        tried: all that was timed.
        report: the best one on rows that nothing was chosen by, beside what it must beat; None where the dense model is
            the best.
        model, tokenizer: whose plan it is: the model given, or the one that was trained along.
        skipped: budgets that no plan was found for, and why.
        ranges: inputs that int8 measured its ranges on; empty where the best is not in int8.
    """

    best: Tried
    tried: tuple[Tried, ...]
    report: Trial | None
    model: nn.Module
    tokenizer: Any
    skipped: tuple[str, ...] = ()
    ranges: tuple[Mapping[str, Tensor], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "skipped": list(self.skipped),
            "best": self.best.to_dict(),
            "tried": [one.to_dict() for one in self.tried],
            "report": None if self.report is None else self.report.to_dict(),
        }


@dataclass(frozen=True)
class ReadyToTune:
    """What tuning starts from.

    Attributes:
        chosen_by: rows that plans are searched for and chosen on.
        reported_on: the others.
    """

    chosen_by: ReadyToTry
    reported_on: ReadyToTry
    settings: tuple[Setting, ...]


def work_of(out: Path) -> Path:
    """Where plans are kept while ``out`` is in the making: ``out.tune`` beside it."""
    out = out.absolute()
    return out.with_name(f"{out.name}.tune")


def prepare_tuning(options: TuneOptions) -> ReadyToTune:
    """Load and check everything `prunepass tune` needs.

    Raises:
        OptionError: the output is taken, work of an earlier run lies there and nothing is said of it, no target can
            be used, or there is no such model.
        MissingExtraError: a target that is asked for is not installed.
        DataError: as `prepare_trial`.
    """
    check_free(options.out, overwrite=options.overwrite, inputs=[options.model, options.data.name])
    _check_work(options)
    named = targets(options.target)
    asked = EvalOptions(
        options.model, options.data, rows=options.rows, max_length=options.max_length, seed=options.seed
    )
    ready = prepare_trial(asked)
    if len(ready.source) < 4:
        raise OptionError(f"There are {len(ready.source)} rows; half of them choose, half report: give more.")
    order = list(range(len(ready.source)))
    random.Random(options.seed).shuffle(order)
    half = len(order) // 2
    chosen_by, reported_on = (_part(ready, sorted(places)) for places in (order[:half], order[half:]))
    if options.train is False and options.epochs != TuneOptions.epochs:
        raise OptionError(f"{option('epochs')} is for {option('train', True)}, which was not asked for.")
    settings = tuple(setting for target in named for setting in settings_of(target, ready.loaded.model))
    return ReadyToTune(chosen_by, reported_on, settings)


#: options that decide which plans are found, and on which rows
_SAME = ("model", "data", "rows", "seed", "max_length", "max_evaluations", "epochs", "batch_size")
_RECORD = "tune.json"


def _record(options: TuneOptions) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({name: asdict(options)[name] for name in _SAME}, default=str))
    return found


def _check_work(options: TuneOptions) -> None:
    """Raises `OptionError` where plans of an earlier run lie there that are not to be gone on with, or of another."""
    work = work_of(options.out)
    if not work.is_dir() or not any(work.iterdir()):
        if options.resume:
            raise OptionError(f"There is nothing in {work} to go on with; leave out {option('resume', True)}.")
        return
    file = work / _RECORD
    if not file.is_file():
        raise OptionError(f"{work} was not written by prunepass tune, which keeps its plans there. Choose another OUT.")
    if not options.resume:
        raise OptionError(
            f"{work} holds plans of an earlier run. Go on with {option('resume', True)}, or remove that folder to "
            "start anew."
        )
    before, now = json.loads(file.read_text(encoding="utf-8")), _record(options)
    if changed := [name for name in _SAME if before.get(name) != now[name]]:
        raise OptionError(
            f"The run in {work} had another {', '.join(option(name) for name in changed)}. Say the same again to go "
            "on, or remove that folder to start anew."
        )


def clear_work(options: TuneOptions) -> None:
    """Remove what tuning kept, and nothing else that lies beside it."""
    work = work_of(options.out)
    for name in _names_of(options):
        shutil.rmtree(_folder(work, name), ignore_errors=True)
        clear_checkpoints(_folder(work, name))
    (work / _RECORD).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it
        work.rmdir()


def _names_of(options: TuneOptions) -> list[str]:
    """Of all plans that are looked for."""
    ways = [*options.scorers, *(["trained"] if options.train else [])]
    return list(dict.fromkeys(f"{way} {share:g}" for way in ways for share in options.budgets))


def _folder(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-")


def tune(options: TuneOptions, ready: ReadyToTune, progress: Progress | None = None, stop: Stop | None = None) -> Tuned:
    """Try everything, and choose. Plans that are found are kept in `work_of`, so that a run can go on.

    Raises:
        CaptureError, RefusalError: the model cannot be pruned.
        KeyboardInterrupt: training was stopped.
    """
    progress = progress or Silent()
    work = work_of(options.out)
    work.mkdir(parents=True, exist_ok=True)
    (work / _RECORD).write_text(json.dumps(_record(options)) + "\n", encoding="utf-8")
    found = _Found(options, ready, work, progress, stop or Stop())
    candidates = found.keeping()
    plain = EvalOptions(options.model, options.data, timed=0, batch_size=options.batch_size)
    base = evaluate(plain, replace(ready.chosen_by, candidates=()), progress)
    tried: list[Tried] = []
    for setting in ready.settings:
        some = replace(ready.chosen_by, candidates=candidates)
        tried += _timed(options, some, setting, progress, base)
    dense = [one for one in tried if one.entry.kind == DENSE]
    allowed = [one for one in tried if one.lost <= options.loss] or [min(dense, key=lambda one: one.lost)]
    best = min(allowed, key=lambda one: one.entry.milliseconds or float("inf"))
    measured = tuple(ranges(ready.chosen_by)) if best.setting.int8 else ()
    if best.entry.kind == DENSE:
        loaded = ready.chosen_by.loaded
        return Tuned(best, tuple(tried), None, loaded.model, loaded.tokenizer, tuple(found.skipped), measured)
    (candidate,) = (one for one in candidates if one.name == best.entry.name)
    last = replace(ready.reported_on, candidates=(candidate,))
    report = evaluate(_trial_options(options, best.setting), last, progress)
    model = ready.chosen_by.loaded.model if candidate.model is None else candidate.model
    tokenizer = ready.chosen_by.loaded.tokenizer
    return Tuned(best, tuple(tried), report, model, tokenizer, tuple(found.skipped), measured)


def _timed(
    options: TuneOptions, ready: ReadyToTry, setting: Setting, progress: Progress, base: Trial
) -> Iterator[Tried]:
    """The dense model and all candidates on one target, scores computed there."""
    trial = evaluate(_trial_options(options, setting), ready, progress, rivals=False)
    for entry in trial.entries:
        yield Tried(setting, entry, base.lost(entry))


def _trial_options(options: TuneOptions, setting: Setting) -> EvalOptions:
    return EvalOptions(
        options.model,
        options.data,
        target=setting.target,
        config=[f"{key}={value}" for key, value in setting.config.items()],
        int8=setting.int8,
        deployed=True,
        timed=options.timed,
        repeats=options.repeats,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )


class _Found:
    """Plans by search, and by training, each kept in a folder once it is there."""

    def __init__(self, options: TuneOptions, ready: ReadyToTune, work: Path, progress: Progress, stop: Stop) -> None:
        self._options, self._ready, self._work = options, ready, work
        self._progress, self._stop = progress, stop
        self.skipped: list[str] = []

    def keeping(self) -> tuple[Candidate, ...]:
        """Those of the fewest FLOPs that lose no more than allowed; the mildest of all where none keeps as much."""
        good: list[tuple[float, Candidate]] = []
        least: tuple[float, Candidate] | None = None
        for make in self._ways():
            for share in sorted({float(f"{share:g}") for share in self._options.budgets}, reverse=True):
                candidate = make(share)
                if candidate is None:
                    break
                lost, flops = self._lost(candidate)
                if least is None or lost < least[0]:
                    least = lost, candidate
                if lost > self._options.loss:
                    break  # smaller budgets lose more
                good.append((flops, candidate))
        if not good:
            return () if least is None else (least[1],)
        return tuple(candidate for _, candidate in sorted(good, key=lambda pair: pair[0])[:_TIMED])

    def _ways(self) -> Iterator[Callable[[float], Candidate | None]]:
        for scorer in dict.fromkeys(self._options.scorers):
            yield partial(self._searched, scorer)
        if self._options.train:
            yield self._trained

    def _lost(self, candidate: Candidate) -> tuple[float, float]:
        options = EvalOptions(self._options.model, self._options.data, timed=0, batch_size=self._options.batch_size)
        trial = evaluate(options, replace(self._ready.chosen_by, candidates=(candidate,)), self._progress, rivals=False)
        (entry,) = (entry for entry in trial.entries if entry.kind == PLAN)
        return trial.lost(entry), entry.flops

    def _searched(self, scorer: str, share: float) -> Candidate | None:
        name = f"{scorer} {share:g}"
        folder = _folder(self._work, name)
        if not (folder / PLAN_FILE).is_file():
            asked = self._options
            options = SearchOptions(
                asked.model, asked.data, folder, Goal(share), scorer=scorer, max_evaluations=asked.max_evaluations,
                batch_size=asked.batch_size, max_length=asked.max_length, seed=asked.seed,
                leave="merge" if scorer == "likeness" else "drop",  # it is the score of what others stand for
            )  # fmt: skip
            ready = self._ready.chosen_by
            rows = ready.source.choose(options.rows, options.seed)
            features = build_dataset(rows, ready.loaded.tokenizer, ready.head, max_length=ready.rows.max_length)
            start = ReadyToSearch(ready.loaded, ready.head, features, rows, ready.collator, None)
            try:
                outcome = search(options, start, self._progress)
            except OptionError as e:  # so few FLOPs cannot be had
                self.skipped.append(f"{name}: {e}")
                return None
            outcome.plan.save_pretrained(folder)
        return Candidate(name, choose(PrunePlan.from_pretrained(folder)))

    def _trained(self, share: float) -> Candidate:
        name = f"trained {share:g}"
        folder = _folder(self._work, name)
        if not (folder / PLAN_FILE).is_file():
            asked = self._options
            try:
                begun = last_checkpoint(folder).is_dir()
            except OptionError:  # none, or one that was cut short
                begun = False
                clear_checkpoints(folder)
            options = TrainOptions(
                asked.model, asked.data, folder, Goal(share), epochs=asked.epochs, batch_size=asked.batch_size,
                max_length=asked.max_length, seed=asked.seed, resume=begun,
            )  # fmt: skip
            start = prepare_training(options)
            # rows that are reported on are no part of the training
            ready = self._ready.chosen_by
            rows = build_dataset(ready.source, ready.loaded.tokenizer, start.head, max_length=start.length)
            start = replace(start, train=rows, evaluation=rows, sources=(ready.source, ready.source))
            with new_folder(folder) as fresh:
                train(options, start, self._progress, self._stop).save_pretrained(fresh)
        ready = self._ready.chosen_by
        return Candidate(name, choose(PrunePlan.from_pretrained(folder)), own_model(folder, ready.loaded, ready.head))


def _part(ready: ReadyToTry, places: Sequence[int]) -> ReadyToTry:
    source: Examples = replace(ready.source, rows=tuple(ready.source.rows[i] for i in places))
    rows = build_dataset(source, ready.loaded.tokenizer, ready.head, max_length=ready.rows.max_length, warns=False)
    return replace(ready, rows=rows, source=source)
