"""Attention received from the end of the text: what the question that follows an image looks at (FastV, SparseVLM)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.errors import PlanError
from prunepass.scorers.base import ScoreInputs, Scorer, as_scores
from prunepass.scorers.queries import attention_of_rows, slots_of_places

__all__ = ["PromptScorer"]


class PromptScorer(Scorer):
    """``s_j = mean over heads h and the row's last n tokens i of text of A_h[i, j]``, A of the block before.

    FastV (arXiv:2403.06764) ranks image tokens by the attention that they receive in one layer, and its code takes that
    from the last token alone (``rows=1``); SparseVLM (arXiv:2410.04417) asks tokens of the text. Where a plan says
    which tokens may leave (`Protect.only_ids`), the others are the text; elsewhere every live token is. One product of
    n queries with the keys is computed, at the gated block only.

    Args:
        rows: n; a row with less text has all of it.

    Raises:
        PlanError: ``rows`` is no whole number of at least 1.
    """

    name: ClassVar[str] = "prompt"
    needs_attention = True

    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise PlanError(f"The scorer 'prompt' takes rows, a whole number of at least 1, not {rows!r}.")
        self.rows = rows

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] mean attention received, float32 or float64."""
        assert inputs.attention is not None
        index, found = _last(inputs, self.rows)
        probabilities = as_scores(attention_of_rows(inputs.attention, index))
        counted = torch.where(found[:, None, :, None], probabilities, torch.zeros_like(probabilities))
        received = counted.sum(dim=2).mean(dim=1)
        return received / found.sum(dim=1, keepdim=True).clamp(min=1).to(received.dtype)


def _last(inputs: ScoreInputs, rows: int) -> tuple[Tensor, Tensor]:
    """[B, n] int64 slots of the last tokens of text, the last one first, and [B, n] bool, False where there is none."""
    asks = torch.ones_like(inputs.rank, dtype=torch.bool) if inputs.alive is None else inputs.alive
    if inputs.protected is not None:
        asks = asks & (inputs.protected > 0)
    place = torch.cumsum(asks.to(torch.int64), dim=1)
    wanted = place[:, -1:] - torch.arange(rows, device=place.device)[None, :]
    return slots_of_places(place, asks, wanted)
