"""The rows of the benchmark: every way to choose the prompt's tokens, at every budget and with every seed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decoder import scorers  # noqa: F401  # registers them
from benchmarks.decoder.oracle import Oracle
from benchmarks.decoder.predictors import TRAINED, Recipe, Trained
from benchmarks.decoder.subject import Pruned, Subject
from prunepass import ScorerSpec

__all__ = ["BUDGETS", "ROWS", "Sample", "figures", "measure", "pruned_row"]

log = logging.getLogger(__name__)

#: shares of the dense prefill's FLOPs
BUDGETS = (0.75, 0.6, 0.45)
#: what the table calls the rows, in its order
ROWS = {
    "random": "random",
    "recency": "sink + recent",
    "norm": "hidden norm",
    "last-row": "last-row attention",
    "mlp": "trained MLP (SDTP)",
    "mlp-positions": "trained MLP with positions",
    "oracle": "gradient oracle",
}
#: rows that differ from seed to seed in more than the prompts
SEEDED = ("random", *TRAINED)


@dataclass(frozen=True)
class Sample:
    """Prompts with what follows them.

    Attributes:
        text: [R, P + C] ids of real text.
        greedy: [R, P + C], the same prompts with the dense model's own greedy continuation.
    """

    text: Tensor
    greedy: Tensor

    @classmethod
    def draw(cls, subject: Subject, pool: Tensor, rows: int, seed: int) -> Sample:
        """``rows`` rows of ``pool`` [N, P + C], chosen by ``seed``."""
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        text = pool[order[:rows]]
        prompts, new = text[:, : subject.prompt], text.shape[1] - subject.prompt
        model: Any = subject.model
        # an end of the text is a token like others, so that all rows are equally long
        greedy = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )
        return cls(text, greedy)


def figures(pruned: Pruned, sample: Sample, batch: int) -> dict[str, float]:
    """``perplexity`` of the text after the prompts; ``agreement``: the share of the tokens of the dense model's own
    greedy continuation that this model would choose, too, given those before."""
    loss = chosen = 0.0
    for text, greedy in zip(sample.text.split(batch), sample.greedy.split(batch), strict=True):
        logits = pruned.logits(text)
        loss += float(F.cross_entropy(logits.flatten(0, 1), text[:, -logits.shape[1] :].flatten(), reduction="sum"))
        chosen += float((pruned.logits(greedy).argmax(-1) == greedy[:, -logits.shape[1] :]).sum())
    tokens = len(sample.text) * logits.shape[1]
    return {"perplexity": round(exp(loss / tokens), 5), "agreement": round(chosen / tokens, 5)}


def measure(
    subject: Subject, weights: Trained, test: Tensor, seeds: Sequence[int], recipe: Recipe, rows: int, batch: int
) -> Iterator[dict[str, Any]]:
    """The records of all rows, budget by budget.

    Args:
        weights: of the predictors, for each seed.
        test: [N, P + C] ids.
        rows: tested on with each seed; a multiple of ``batch``.
    """
    samples = {seed: Sample.draw(subject, test, rows, seed) for seed in seeds}
    for seed, sample in samples.items():
        yield {"row": "full", "budget": 1.0, "seed": seed, "flops": 1.0} | figures(Pruned(subject), sample, batch)
    for budget in BUDGETS:
        made = cache(lambda row, seed, b=budget: pruned_row(subject, row, b, seed, weights, recipe, batch))
        for row in ROWS:
            for seed, sample in samples.items():
                pruned, stages = made(row, seed if row in SEEDED else None)
                found = figures(pruned, sample, batch)
                record = {"row": row, "budget": budget, "seed": seed, "flops": round(pruned.flops(batch), 5)}
                log.info("%s %s", record, found)
                yield record | found | {"stages": stages}


def pruned_row(
    subject: Subject,
    row: str,
    budget: float,
    seed: int | None,
    weights: Trained,
    recipe: Recipe,
    batch: int,
) -> tuple[Pruned, list[dict[str, Any]]]:
    """The model compiled with a row's plan, and the plan's stages as JSON takes them.

    Args:
        row: a key of `ROWS`.
        seed: of the random scores, or whose of the ``weights`` the predictors have; None for rows without.
        batch: prompts that run at a time.
    """
    prepare = None
    if row == "oracle":
        oracle = Oracle(subject, budget, batch)
        plan, prepare = oracle.plan, oracle.prepare
    elif row in TRAINED:
        assert seed is not None
        plan = subject.plan(ScorerSpec("mlp"), budget, recipe.of(row).predictor, weights=weights[row, seed])
    else:
        plan = subject.plan(ScorerSpec.of({"name": row, "seed": seed} if row == "random" else row), budget)
    return Pruned(subject, plan, prepare), [stage.to_dict() for stage in plan.stages]
