"""Attention received: how much the row's tokens look at each token (ToP, KDD 2023, section 3)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.scorers.base import Attention, ScoreInputs, Scorer, as_scores

__all__ = ["AttentionScorer"]


class AttentionScorer(Scorer):
    """``s_j = mean over heads h and live query rows i of A_h[i, j]``, A being the attention of the block before.

    ToP's released code also averages over padding rows and rows pruned before; here only live rows count, so that
    padding changes nothing. The first token, which ToP leaves out of the ranking, is protected by the plan instead.
    Computed for the gated block only, so every block keeps its fused attention; the cost is one more query-key product.
    """

    name: ClassVar[str] = "attention"
    needs_attention: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] mean attention received, float32 or float64."""
        assert inputs.attention is not None
        probabilities = as_scores(_probabilities(inputs.attention))
        if inputs.alive is None:
            return probabilities.mean(dim=(1, 2))
        rows = inputs.alive[:, None, :, None]
        received = torch.where(rows, probabilities, torch.zeros_like(probabilities)).sum(dim=2).mean(dim=1)
        return received / inputs.alive.sum(dim=1, keepdim=True).clamp(min=1).to(received.dtype)


def _probabilities(attention: Attention) -> Tensor:
    """[B, H, T, T] softmax of the masked scores, from queries and keys where the model keeps them fused."""
    if attention.probabilities is not None:
        return attention.probabilities
    query, key = attention.query, attention.key
    assert query is not None
    assert key is not None
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    scores = as_scores(torch.matmul(query * scale, key.transpose(-1, -2)))
    lowest = torch.finfo(scores.dtype).min
    if attention.is_causal:
        slots = torch.arange(query.shape[2], device=query.device)
        scores = scores.masked_fill(slots[None, :] > slots[:, None], lowest)
    if attention.mask is not None:
        if attention.mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention.mask, lowest)
        else:
            scores = scores + attention.mask.to(scores.dtype)
    return torch.softmax(scores, dim=-1)
