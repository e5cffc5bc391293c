"""The rows of the benchmark: every way to spend fewer FLOPs, at every budget, on one task and with one seed."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import predict
from benchmarks.accuracy.tasks import Task, find_task
from benchmarks.accuracy.teachers import load_tokenizer, model_folder
from benchmarks.accuracy.truncation import MAIN_BUDGET, SHARES, truncation
from benchmarks.store import stages_text
from benchmarks.training import arguments, bf16_pays
from prunepass import PrunePlan
from prunepass.cost import FlopCounter, corpus_flops
from prunepass.cost.blocks import BlockCosts
from prunepass.cost.plans import PlanCosts
from prunepass.plan import Protect, ScorerSpec
from prunepass.plan.annotations import Leave, Segment
from prunepass.training.data.heads import head_of
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.recipe import restore_for
from prunepass.training.loop.student import Phase
from prunepass.training.loop.trainer import PruneTrainer
from prunepass.training.methods.graphs import TrainingGraphs
from prunepass.training.methods.schedules import spread

log = logging.getLogger(__name__)

TRAINED = ("top", "sdtp", "both")
KNOWN = ("free", "truncated", *TRAINED)
#: keys of an example's texts
PARTS = ("text", "second")
#: the row of "both" before the model adapts: predictors trained on the frozen model, layers and shares searched for
SEARCHED = "search"


@dataclass(frozen=True)
class Recipe:
    """How the trained rows are trained. One model learns all budgets, and 2/5 at half of the steps.

    Attributes:
        epochs: there are as many steps as in so many passes over the task's own examples, whatever is mixed in.
        examples: of the training data, at most.
        max_length: longer texts are cut to it while training (not while testing).
        transfer: tasks whose training texts, without labels, are mixed among the task's own. The dense model knows the
            few texts of a small task by heart, and what it says of others teaches more.
        calibration: rows that the search for stages looks at.
        restore: what takes the place of pruned tokens; None takes what training takes by default
            (`prunepass.training.loop.recipe.restore_for`).
        segment: part of a pair that all rows keep.
        last: tokens at the end that all rows keep; a causal classifier reads the last one.
        leave: how tokens leave at the stages of trained rows.
        budgets: what the trained rows learn; None for all. The fewer, the more steps each has.
    """

    epochs: float = 3.0
    examples: int = 6000
    batch: int = 32
    learning_rate: float = 2e-4
    max_length: int | None = None
    transfer: tuple[str, ...] = ()
    calibration: int = 128
    restore: str | None = None
    segment: Segment | None = None
    budgets: tuple[str, ...] | None = None
    leave: Leave = "drop"
    last: int = 0

    @property
    def protect(self) -> Protect:
        """What the plans of all rows protect."""
        return Protect(segment=self.segment, last=self.last)


RECIPES: dict[str, Recipe] = {
    "20newsgroups": Recipe(epochs=2, examples=3000, learning_rate=1e-4),
    "sst2": Recipe(epochs=2, examples=8000, calibration=768, budgets=("1/2", "2/5")),
    "mrpc": Recipe(epochs=3, transfer=("stsb", "rte"), calibration=768, budgets=("1/2", "2/5")),
    "stsb": Recipe(epochs=4, transfer=("mrpc", "rte"), calibration=768, budgets=("1/2", "2/5")),
    "rte": Recipe(epochs=5, transfer=("stsb", "mrpc"), calibration=512),
    "squad": Recipe(epochs=2, examples=6000, calibration=64),
    "conll2003": Recipe(epochs=5, batch=8, calibration=48),
    # documents are told apart by single words: in a mean over lenses they drown (35.2 against 36.5 at 2/5, frozen)
    "cranfield": Recipe(epochs=2, examples=3000, calibration=64, restore="zeros"),
    "stsb-embedding": Recipe(
        epochs=6, examples=12_000, transfer=("mrpc", "rte"), calibration=768, budgets=("1/2", "2/5")
    ),
    "reranking": Recipe(
        epochs=2, examples=16_000, learning_rate=1e-4, calibration=128, segment="first", budgets=("1/2", "2/5")
    ),
    "sst2-gemma": Recipe(epochs=1, examples=6000, learning_rate=3e-5, calibration=96, budgets=("2/5",), last=1),
    "reranking-cranfield": Recipe(epochs=1, examples=16_000, learning_rate=1e-4, calibration=128, segment="first"),
}


def budgets_of(row: str) -> tuple[Fraction, ...]:
    """The budgets that a row can meet: attention is known after the first of six blocks, a sixth of the FLOPs."""
    return SHARES[:-1] if row in ("attention", "top") else SHARES


def _goal_first(row: str, recipe: Recipe) -> list[Fraction]:
    """The budgets that a trained row learns, with the one that counts most before the others."""
    learned = None if recipe.budgets is None else set(map(Fraction, recipe.budgets))
    found = [budget for budget in budgets_of(row) if learned is None or budget in learned]
    return sorted(found, key=lambda budget: budget != MAIN_BUDGET)


class Run:
    """One task with one seed.

    Args:
        every: score only every so many test examples; the task's own default where left out.
        validates: score the task's validation rows in place of its test examples.
    """

    def __init__(self, task: Task, seed: int, every: int | None = None, *, validates: bool = False) -> None:
        self.task, self.seed = task, seed
        self.tokenizer = load_tokenizer(task.base)
        self.test = task.features(task.validation() if validates else task.test(every), self.tokenizer)
        self.dense = task.build_dense(model_folder(task))
        self.head = head_of(self.dense)
        example = self.head.model_inputs(task.collator(self.tokenizer)([dict(self.test[i]) for i in range(2)]))
        self._graphs = TrainingGraphs(self.dense, example)

    def score(self, model: nn.Module, *, bf16: bool | None = None) -> dict[str, float]:
        """The task's figures of a model on the test examples; in bf16 autocast where that pays, or as said."""
        with _autocast(bf16_pays() if bf16 is None else bf16):
            return self.task.metric(predict(model, self.test, self.task.kind, self.tokenizer), self.test)

    @cached_property
    def dense_score(self) -> dict[str, float]:
        """The dense model's figures."""
        return self.score(self.dense)

    def share(self, plan: PrunePlan, width: int | None = None) -> float:
        """FLOPs of a plan on the test rows' real tokens, scoring included, as a share of the dense model's."""
        lens = PruneConfig.lens_rank if plan.restore == "lens" else 0
        costs = BlockCosts.of(self._graphs.captured, scorer=plan.scorer, hidden=width, lens=lens)
        return PlanCosts.over(costs, self.test.lengths, plan.protect).share(plan.stages)

    def dense_flops(self) -> dict[str, int]:
        """FLOPs of the dense model on the test rows: padded to the task's maximum, to batches of 32, and not at all."""
        counter = FlopCounter(self._graphs.captured.graph_module)
        return asdict(corpus_flops(counter, self.test.lengths, max_length=self.task.max_length))

    # -- rows ----------------------------------------------------------------------------------------------------

    def training_free(self, scorer: str) -> Iterator[dict[str, Any]]:
        """A scorer without weights on the geometric schedule that meets each budget."""
        options = {"name": "random", "seed": self.seed} if scorer == "random" else scorer
        spec = ScorerSpec.of(options)
        costs, protect = BlockCosts.of(self._graphs.captured, scorer=spec), RECIPES[self.task.name].protect
        for budget in budgets_of(scorer):
            stages = spread(float(budget), costs, lengths=self.test.lengths, layers=_layers(scorer, budget, costs))
            plan = PrunePlan(stages, spec, protect, restore=restore_for(self.head, lens=False))
            yield self._row(scorer, budget, plan, self.score(self._graphs.pruned(plan)))

    def trained(self, method: str, recipe: Recipe, keep: Path | None = None) -> Iterator[dict[str, Any]]:
        """A method at all budgets, and for "both" what its search alone found.

        Args:
            keep: folder for the plans and the adapted model.
        """
        transformers.set_seed(self.seed)
        model = self.task.build_dense(model_folder(self.task))
        trainer = self._trainer(model, method, recipe)
        early = _BeforeAdapting(trainer, lambda: list(self._rows(SEARCHED, trainer, recipe)))
        if method == "both":
            trainer.add_callback(early)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started - early.seconds
        log.info("%s, %s: trained in %.0f s", self.task.name, method, seconds)
        yield from early.rows
        for row in self._rows(method, trainer, recipe):
            yield row | {"training": asdict(recipe) | {"seconds": round(seconds), "steps": trainer.state.global_step}}
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)  # plans of an earlier run would pass for this one's
            trainer.save_model(str(keep))

    def _rows(self, method: str, trainer: PruneTrainer, recipe: Recipe) -> Iterator[dict[str, Any]]:
        student = trainer.student
        student.eval()
        budgets = _goal_first(method, recipe)
        for budget, bare in sorted(zip(budgets, student.plans, strict=True), key=itemgetter(0), reverse=True):
            module = student.forms.graphs.pruned(bare, student.scorers(bare))
            yield self._row(method, budget, bare, self.score(module))
        student.train()

    def _row(self, method: str, budget: Fraction, plan: PrunePlan, figures: dict[str, float]) -> dict[str, Any]:
        width = PruneConfig(Goal(share=0.5)).predictor_width if plan.scorer.name == "mlp" else None
        row = {
            "row": method,
            "budget": str(budget),
            "flops": round(self.share(plan, width), 4),
            "plan": stages_text(plan.stages),
            "first": plan.protect.first,
            **rounded(figures),
        }
        log.info("%s %s %.3f (%.3f): %s", self.task.name, method, float(budget), row["flops"], figures)
        return row

    def _trainer(self, model: nn.Module, method: str, recipe: Recipe) -> PruneTrainer:
        examples = self.task.train()[: recipe.examples]
        features = self.task.features(examples, self.tokenizer, cut=recipe.max_length)
        own = _inputs_only(features)
        steps = math.ceil(len(own) / recipe.batch * recipe.epochs)
        rows = self._mixed(own, recipe)
        goal, *others = _goal_first(method, recipe)
        config = PruneConfig(
            Goal(share=float(goal)),
            method=method,
            extra_budgets=tuple(map(float, others)),
            max_evaluations=48,
            calibration_rows=recipe.calibration,
            protect=recipe.protect,
            leave=recipe.leave,
            restore=recipe.restore or restore_for(self.head, lens=method == "both", leave=recipe.leave),
        )
        how = arguments(
            "unused",
            batch=recipe.batch,
            log_every=25,
            max_steps=steps,
            per_device_eval_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.06,
            train_sampling_strategy="group_by_length",
            bf16=bf16_pays(),
            seed=self.seed,
        )
        return PruneTrainer(
            model, config, how, self.task.collator(self.tokenizer), rows, calibration_dataset=own, head=self.head
        )

    def _mixed(self, rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
        """The rows with those of other tasks among them, but for texts that are tested on here."""
        tested = {example.get(part) for example in self.test.examples for part in PARTS} - {None}
        mixed = list(rows)
        for name in recipe.transfer:
            other = find_task(name)
            texts = [e for e in other.train() if not tested & {e.get(part) for part in PARTS}]
            if self.task.kind == "embedding":  # such a model reads one text at a time
                texts = [
                    {"text": text} for text in dict.fromkeys(e[part] for e in texts for part in PARTS if part in e)
                ]
            cut = min(self.task.max_length, other.max_length)
            mixed += _inputs_only(other.features(texts, self.tokenizer, cut=cut))
        random.Random(self.seed).shuffle(mixed)
        return mixed


class _BeforeAdapting(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is not typed throughout
    """Scores what was found before the model's own weights move."""

    def __init__(self, trainer: PruneTrainer, score: Callable[[], list[dict[str, Any]]]) -> None:
        self._trainer, self._score = trainer, score
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        student = self._trainer.student
        if self.rows or student.phase is Phase.RANK or not student.plans:
            return
        started = time.perf_counter()
        self.rows = self._score()
        self.seconds = time.perf_counter() - started


def rows_of(run: Run, row: str, keep: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of one of `KNOWN`; ``keep`` as `Run.trained` takes it."""
    if row == "free":
        for scorer in ("random", "attention"):
            yield from run.training_free(scorer)
    elif row == "truncated":
        for share, figures in truncation(run.task, run.dense, run.tokenizer, run.test.examples).items():
            yield {"row": row, "budget": share, **rounded(figures)}
    else:
        yield from run.trained(row, RECIPES[run.task.name], keep)


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """For a row."""
    return {name: round(value, 6) for name, value in figures.items()}


def _layers(scorer: str, budget: Fraction, costs: BlockCosts) -> range:
    """Before each block but the first; before that, too, where the budget asks for it."""
    return range(0 if budget < Fraction(1, 5) and scorer != "attention" else 1, costs.num_blocks)


def _inputs_only(features: Features) -> list[dict[str, Any]]:
    """The unpruned model teaches, so labels stay behind."""
    return [
        {k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        for row in features.rows
    ]


def _autocast(enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()
