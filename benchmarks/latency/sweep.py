"""Many groups of cells, one after the other: what is there is left alone, what cannot be is named and skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.latency import results
from benchmarks.latency.cells import Group, Setup, measure
from benchmarks.latency.corpus import load_texts, measure_corpus
from benchmarks.latency.models import MODELS, find_model
from benchmarks.latency.targets import TARGETS, find_target

__all__ = ["PRESETS", "Corpus", "Outcome", "Sweep", "run_corpus", "run_groups"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """All combinations of these; see `cells.Group` and `cells.Setup`.

    Attributes:
        again: measure what has results already.
    """

    models: tuple[str, ...]
    targets: tuple[str, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    budgets: tuple[Fraction, ...] = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
    shapes: str = "dynamic"
    scorer: str = "norm"
    stages: int = 4
    repeats: int = 20
    seconds: float | None = None
    threads: int = 1
    again: bool = False

    @property
    def setup(self) -> Setup:
        """How each group is timed."""
        return Setup(self.scorer, self.stages, self.repeats, self.seconds, self.threads)

    def groups(self) -> Iterator[Group]:
        """Every group.

        Raises:
            OptionError: an unknown model or target; nothing has been measured then.
        """
        for model in self.models:
            find_model(model)
        for target in self.targets:
            find_target(target)
        for one in product(self.models, self.targets, self.lengths, self.batches):
            yield Group(*one, shapes=self.shapes)


PRESETS = {
    "main": Sweep(
        models=("bert-base",),
        targets=("openvino-f32", "openvino-bf16", "inductor-f32"),
        lengths=(128, 512),
        batches=(1, 8),
    ),
    "all": Sweep(
        models=tuple(MODELS),
        targets=tuple(name for name in TARGETS if not name.startswith("eager")),
        lengths=(64, 128, 256, 512, 2048),
        batches=(1, 8, 32),
    ),
}


@dataclass(frozen=True)
class Corpus:
    """Texts to take: so many batches of a data set."""

    name: str
    batches: int


@dataclass(frozen=True)
class Outcome:
    """What became of a group: "written", "there already", "skipped" or "failed", with the file or the reason."""

    group: str
    what: str
    detail: str

    @property
    def failed(self) -> bool:
        """Whether it should have been measured and was not."""
        return self.what == "failed"

    def __str__(self) -> str:
        return f"{self.group}: {self.what}: {self.detail}"


def run_groups(sweep: Sweep, folder: Path) -> Iterator[Outcome]:
    """Measure every group of the sweep that has no results for all budgets; yields each as soon as it is done."""
    for group in list(sweep.groups()):
        file = results.file_of(group, sweep.setup, folder)
        budgets = results.budgets_to_measure(file, sweep.budgets, again=sweep.again)
        reason = _why_not(group)
        if not budgets:
            yield Outcome(str(group), "there already", str(file))
        elif reason:
            yield Outcome(str(group), "skipped", reason)
        else:
            yield _measured(str(group), file, partial(measure, group, budgets, sweep.setup))


def run_corpus(sweep: Sweep, corpus: Corpus, folder: Path) -> Iterator[Outcome]:
    """The same for the texts of a corpus; the sweep's lengths are not used.

    Raises:
        OptionError: no such corpus, its data are not there, or it has too few texts.
    """
    groups = dict.fromkeys(Group(g.model, g.target, 0, g.batch, g.shapes) for g in sweep.groups())
    for group in groups:
        name = f"{corpus.name} on {group.model} {group.target}, batches of {group.batch}"
        file = results.corpus_file(corpus.name, group, sweep.setup, folder)
        budgets = results.budgets_to_measure(file, sweep.budgets, again=sweep.again)
        reason = find_target(group.target).why_not()
        if not budgets:
            yield Outcome(name, "there already", str(file))
        elif reason:
            yield Outcome(name, "skipped", reason)
        else:
            texts = load_texts(corpus.name, corpus.batches * group.batch)
            yield _measured(name, file, partial(measure_corpus, group, texts, budgets, sweep.setup))


def _why_not(group: Group) -> str | None:
    longest = find_model(group.model).longest
    if group.length > longest:
        return f"the model takes at most {longest} tokens"
    return find_target(group.target).why_not()


def _measured(name: str, file: Path, measured: Callable[[], dict[str, Any]]) -> Outcome:
    try:
        record = measured()
    except Exception as e:  # runtimes raise of every kind, and hours of other groups may stand behind this one
        log.debug("%s failed", name, exc_info=True)
        return Outcome(name, "failed", f"{type(e).__name__}: {e}")
    return Outcome(name, "written", str(results.write(file, record)))
