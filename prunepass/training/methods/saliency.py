"""SDTP's labels: how much each token's hidden state matters to the output (arXiv:2504.04514, eq. 3).

The paper defines the saliency of token i at a layer with input x as ``dT/dx * x`` and leaves open which scalar T is,
whether the sign counts, and the scale. `SALIENCIES` lists the choices tried; see `saliency` for the one taken and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunepass.errors import OptionError
from prunepass.training.data.distances import live, mean_pooled, wide

__all__ = ["SALIENCIES", "confidence", "saliency"]

#: how a gradient g and a hidden state h [B, S, D] become one number a token
SALIENCIES = {
    "signed": lambda g, h: (g * h).sum(-1),
    "absolute": lambda g, h: (g * h).sum(-1).abs(),
    "norm": lambda g, h: (g * h).norm(dim=-1),
    "gradient": lambda g, h: g.norm(dim=-1),
}


def saliency(target: Tensor, hidden: Sequence[Tensor], kind: str = "absolute") -> list[Tensor]:
    """Labels at several cuts by one backward pass.

    The kinds differ far more as scores of their own than by what predictors learn from them. MiniLM on STS-B at 1/2 of
    the FLOPs, frozen, development set: tokens chosen by the labels themselves gave a Spearman correlation of .716
    (absolute), .826 (norm) and .824 (gradient) on 600 rows, where the dense model has .860; predictors trained on them
    .829, .826 and .825 on all 1,500 (dense .848). So the size of the paper's own product stays.

    Args:
        target: T, a scalar that depends on ``hidden``; the sum over rows of what the head is most sure of
            (`training.heads`).
        hidden: [B, S, D] at each cut, each with a gradient path to ``target``.
        kind: a key of `SALIENCIES`.

    Returns:
        [B, S] for each, in at least float32, detached.

    Raises:
        OptionError: an unknown kind.
    """
    if kind not in SALIENCIES:
        raise OptionError(f"There is no saliency {kind!r}; choose one of {', '.join(SALIENCIES)}.")
    gradients = torch.autograd.grad(target, list(hidden), retain_graph=False)
    with torch.no_grad():
        return [SALIENCIES[kind](wide(g), wide(h)) for g, h in zip(gradients, hidden, strict=True)]


def confidence(outputs: Any, batch: Mapping[str, Tensor], salient: Tensor | None = None) -> Tensor:
    """The scalar T whose saliency is taken: what the model is most sure of, summed over the batch.

    It needs no labels. Per row: the largest logit of a classifier (the logit itself of a regression); the largest start
    and the largest end logit; the mean of the largest logits of live tokens; for embeddings, the length of the pooled
    vector along its own direction.

    Args:
        salient: bool [B, S], whose logits count in place of the live tokens'. A token of a causal model matters most to
            its own logit, which hides what later tokens take from it: of a prompt that is to be pruned, only the
            logits after it tell what to keep.
    """
    where = live(batch)
    if "start_logits" in outputs:
        dead = ~where
        start, end = (wide(outputs[name]).masked_fill(dead, -torch.inf) for name in ("start_logits", "end_logits"))
        return start.amax(1).sum() + end.amax(1).sum()
    if "logits" not in outputs:
        hidden = wide(outputs["last_hidden_state"])
        mean = (hidden * where.unsqueeze(-1)).sum(1) / where.sum(1, keepdim=True).clamp(min=1)
        return (mean * mean_pooled(hidden, where).detach()).sum()
    largest: Tensor = wide(outputs["logits"]).amax(-1)
    if largest.dim() == 1:
        return largest.sum()
    if salient is not None:
        where = salient
    return ((largest * where).sum(1) / where.sum(1).clamp(min=1)).sum()
