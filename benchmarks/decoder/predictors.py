"""SDTP's predictors for a causal model: `PruneTrainer` on rows whose labels begin after the prompt."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.decoder.oracle import SALIENCY
from benchmarks.decoder.subject import PROTECT, Predictor, Subject
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.training.data.metrics import IGNORED
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer

__all__ = ["TRAINED", "Recipe", "Trained", "over_rows", "train_all", "train_predictors"]

log = logging.getLogger(__name__)

#: rows of trained predictors, and whether they look at places
TRAINED = {"mlp": False, "mlp-positions": True}
#: weights of a plan's predictors, by row and seed
Trained = Mapping[tuple[str, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained; the model is frozen.

    Attributes:
        predictor: of every stage.
        budget: whose stages the predictors are trained at. They rank whatever is kept.
        select: share of the steps in which they also learn through soft choices what keeps the dense model's answers.
    """

    predictor: Predictor = field(default_factory=Predictor)
    budget: float = 0.6
    steps: int = 240
    batch: int = 8
    learning_rate: float = 4e-3
    select: float = 0.0

    def of(self, row: str) -> Recipe:
        """For a row of `TRAINED`."""
        return replace(self, predictor=replace(self.predictor, positions=TRAINED[row]))


def train_all(subject: Subject, rows: Tensor, recipe: Recipe, seeds: Iterable[int]) -> Trained:
    """`train_predictors` for all of `TRAINED` and with each seed."""
    return {(row, seed): train_predictors(subject, rows, recipe.of(row), seed) for seed in seeds for row in TRAINED}


def train_predictors(
    subject: Subject, rows: Tensor, recipe: Recipe, seed: int, labels: Tensor | None = None
) -> Mapping[str, Tensor]:
    """Weights of a plan with a predictor before each block but the first.

    Args:
        rows: [N, P + C] ids. What a token of the first P is worth is what the C after it take from it.
        labels: [N, P + C], by default those C.
    """
    if labels is None:
        labels = rows.masked_fill(torch.arange(rows.shape[1]) < subject.prompt, IGNORED)
    chosen = subject.plan(ScorerSpec("mlp"), recipe.budget, recipe.predictor)
    plan = over_rows(chosen, subject.prompt, rows.shape[1])
    config = PruneConfig(
        Goal(share=recipe.budget),
        method="sdtp",
        plan=plan,
        predictor_width=recipe.predictor.width,
        predictor_positions=recipe.predictor.positions,
        predictor_learning_rate=recipe.learning_rate,
        freeze_model=True,
        gate_steps=recipe.select,
        saliency=SALIENCY,
    )
    model = copy.deepcopy(subject.model)
    model.config.use_cache = False  # a traced graph returns no cache
    data = [{"input_ids": row, "labels": wanted} for row, wanted in zip(rows, labels, strict=True)]
    with TemporaryDirectory() as folder:
        trainer = PruneTrainer(model, config, _arguments(recipe, seed, folder), _stacked, data)
        trainer.train()
    log.info("predictors, seed %d: %s", seed, trainer.state.log_history[-2])
    trained = trainer.plan
    assert trained is not None
    return trained.weights


def over_rows(plan: PrunePlan, prompt: int, length: int) -> PrunePlan:
    """The plan for prompts as one for rows that go on: what comes after the prompt is protected, and kept besides."""
    rest = length - prompt
    local = ceil(PROTECT.last_share * prompt)
    stages = [Stage(s.layer, (ceil(s.keep * prompt) + rest) / length) for s in plan.stages]  # type: ignore[arg-type]  # made a fraction
    return replace(plan, stages=tuple(stages), protect=Protect(first=PROTECT.first, last=local + rest))


def _stacked(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows are equally long."""
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}


def _arguments(recipe: Recipe, seed: int, folder: str) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, recipe.steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
