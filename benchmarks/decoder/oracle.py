"""The true saliency of a prompt's tokens, for which one has to know how the text goes on: SDTP's upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder.subject import Subject
from prunepass import PrunePlan, ScorerSpec
from prunepass.training.methods.saliency import saliency

__all__ = ["SALIENCY", "Oracle", "future_saliency"]

#: kind of saliency that predictors learn and the oracle has
SALIENCY = "norm"


def future_saliency(model: Any, ids: Tensor, prompt: int, cuts: Sequence[int], kind: str = SALIENCY) -> list[Tensor]:
    """[R, P] for each cut: how much each token of the prompt matters to the largest logits after it.

    Args:
        ids: [R, P + C]; the first P are the prompt.
        cuts: blocks before which the hidden state is looked at.
        kind: a key of `prunepass.training.methods.saliency.SALIENCIES`.
    """
    hidden: dict[int, Tensor] = {}
    handles = [
        model.model.layers[cut].register_forward_pre_hook(
            lambda _, args, cut=cut: hidden.update({cut: args[0]})  # transformers gives the state by position
        )
        for cut in cuts
    ]
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]
            target = logits.amax(-1).mean(1).sum()
    finally:
        for handle in handles:
            handle.remove()
    return [found[:, :prompt] for found in saliency(target, [hidden[cut] for cut in cuts], kind)]


class Oracle:
    """A plan whose scores are the true saliency; `prepare` writes those of the next rows.

    Args:
        rows: how many prompts run at a time.
    """

    def __init__(self, subject: Subject, budget: float, rows: int) -> None:
        self._subject = subject
        bare = subject.plan(ScorerSpec("given"), budget)
        self._cuts = [stage.layer for stage in bare.stages]
        self._scores = [torch.zeros(rows, subject.prompt) for _ in self._cuts]
        weights = {f"stages.{i}.scores": scores for i, scores in enumerate(self._scores)}
        self.plan = PrunePlan(bare.stages, bare.scorer, bare.protect, weights=weights)

    def prepare(self, ids: Tensor) -> None:
        """For rows [R, P + C]."""
        found = future_saliency(self._subject.model, ids, self._subject.prompt, self._cuts)
        for scores, true in zip(self._scores, found, strict=True):
            scores.copy_(true)
