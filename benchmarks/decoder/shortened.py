"""Cutting the cache after the prompt, alone and on top of pruning: what both cost in quality, and how much is held."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import prunepass
from benchmarks.decoder.predictors import Recipe, train_predictors
from benchmarks.decoder.rows import Sample, figures
from benchmarks.decoder.subject import Pruned, Subject
from prunepass import PrunePlan, ScorerSpec

__all__ = ["KEEPS", "WINDOW", "Shortened", "measure_caches"]

log = logging.getLogger(__name__)

#: shares of what each layer's cache holds after the prompt; 1 leaves it as it is
KEEPS = (1.0, 0.5, 0.25)
#: the prompt's last tokens whose attention decides; all rows protect as many
WINDOW = 16


@dataclass
class Held:
    """Tokens that the caches held after the prompt, as a share of what the dense model's hold."""

    share: float = 1.0


class Shortened(Pruned):
    """A model under a plan, whose caches are cut after each prompt.

    Args:
        keep: see `prunepass.compress_cache`.
    """

    def __init__(self, subject: Subject, plan: PrunePlan | None, keep: float) -> None:
        super().__init__(subject, plan)
        self._keep = keep
        self.held = Held()

    def after_prompt(self, cache: Any, prompt: Tensor) -> Any:
        """The cache that the rest of the text sees."""
        if self._keep < 1:
            cache = prunepass.compress_cache(self._model, cache, prompt, self._keep, window=WINDOW)
        self.held.share = fmean(layer.keys.shape[2] for layer in cache.layers) / prompt.shape[1]
        return cache


def measure_caches(
    subject: Subject, train: Tensor, test: Tensor, seeds: Sequence[int], recipe: Recipe, rows: int, batch: int
) -> Iterator[dict[str, Any]]:
    """Records of the full model and of trained predictors at the recipe's budget, each with every share of `KEEPS`.

    Args:
        train, test, rows, batch: as `rows.measure`.
    """
    for seed in seeds:
        sample = Sample.draw(subject, test, rows, seed)
        weights: Mapping[str, Tensor] = train_predictors(subject, train, recipe, seed)
        plan = subject.plan(ScorerSpec("mlp"), recipe.budget, recipe.predictor, weights=weights)
        for name, chosen in (("full", None), ("mlp", plan)):
            for keep in KEEPS:
                torch._dynamo.reset()
                made = Shortened(subject, chosen, keep)
                record = {"row": name, "keep": keep, "seed": seed} | figures(made, sample, batch)
                record["held"] = round(made.held.share, 4)
                log.info("%s", record)
                yield record
