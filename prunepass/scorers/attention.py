"""Attention received: how much the row's tokens look at each token (ToP, KDD 2023, section 3)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.errors import PlanError
from prunepass.scorers.base import Attention, ScoreInputs, Scorer, as_scores
from prunepass.scorers.queries import attention_of_rows, slots_of_places

__all__ = ["AttentionScorer"]


class AttentionScorer(Scorer):
    """``s_j = mean over heads h and live query rows i of A_h[i, j]``, A being the attention of the block before.

    ToP's released code also averages over padding rows and rows pruned before; here only live rows count, so that
    padding changes nothing. The first token, which ToP leaves out of the ranking, is protected by the plan instead.
    Computed for the gated block only, so every block keeps its fused attention; the cost is one more query-key product.

    Args:
        rows: average over so many query rows alone, at even distances among the row's live tokens, the first and the
            last among them. Of a row with no more tokens all are taken. None for all rows of all.

    Raises:
        PlanError: ``rows`` is no whole number of at least 2.
    """

    name: ClassVar[str] = "attention"
    needs_attention = True

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 2):
            raise PlanError(f"The scorer 'attention' takes rows, a whole number of at least 2, not {rows!r}.")
        self.rows = rows

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] mean attention received, float32 or float64."""
        assert inputs.attention is not None
        if self.rows is not None:
            index, found = _spread(inputs, self.rows)
            some = as_scores(attention_of_rows(inputs.attention, index))
            total = torch.where(found[:, None, :, None], some, torch.zeros_like(some)).sum(dim=2).mean(dim=1)
            return total / found.sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)
        probabilities = as_scores(_probabilities(inputs.attention))
        if inputs.alive is None:
            return probabilities.mean(dim=(1, 2))
        rows = inputs.alive[:, None, :, None]
        received = torch.where(rows, probabilities, torch.zeros_like(probabilities)).sum(dim=2).mean(dim=1)
        return received / inputs.alive.sum(dim=1, keepdim=True).clamp(min=1).to(received.dtype)


def _spread(inputs: ScoreInputs, rows: int) -> tuple[Tensor, Tensor]:
    """[B, n] int64 slots of live tokens at even distances, and [B, n] bool, False where a row has fewer."""
    alive = torch.ones_like(inputs.rank, dtype=torch.bool) if inputs.alive is None else inputs.alive
    place = torch.cumsum(alive.to(torch.int64), dim=1)
    last = place[:, -1:] - 1
    steps = torch.arange(rows, device=place.device)[None, :]
    wanted = torch.where(last >= rows, torch.div(steps * last, rows - 1, rounding_mode="floor"), steps)
    return slots_of_places(place, alive, wanted + 1)


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
