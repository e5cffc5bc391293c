"""Ways to rank the tokens of a prompt that prunepass itself does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepass.errors import WeightsError
from prunepass.scorers import ScoreInputs, Scorer, register

__all__ = ["GivenScorer", "LastRowScorer", "RecencyScorer"]


@register
class RecencyScorer(Scorer):
    """The later, the better. With the first tokens protected this is sink + recent (StreamingLLM, arXiv:2309.17453),
    on the hidden states."""

    name: ClassVar[str] = "recency"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] places in the row, float32."""
        return inputs.rank.to(torch.float32)


@register
class LastRowScorer(Scorer):
    """Attention of the row's last token, mean over the heads of the block before: LazyLLM (arXiv:2407.14057, eq. 1) and
    FastV (arXiv:2403.06764) rank so. It costs one query's row of the product with the keys."""

    name: ClassVar[str] = "last-row"
    needs_attention: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] shares of attention, float32. Takes rows that end in their last token (no padding on the right)."""
        attention = inputs.attention
        assert attention is not None
        assert attention.query is not None
        assert attention.key is not None
        query, key = attention.query[:, :, -1:], attention.key
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        scores = torch.matmul(query * scale, key.transpose(-1, -2)).float()
        if inputs.alive is not None:
            scores = scores.masked_fill(~inputs.alive[:, None, None, :], torch.finfo(torch.float32).min)
        return torch.softmax(scores, dim=-1).mean(dim=(1, 2))


@register
class GivenScorer(Scorer):
    """Scores known from elsewhere, by place in the row: for an oracle, which has seen how the row goes on.

    The plan carries them as ``stages.<i>.scores`` [B, S], and what is compiled reads that very tensor: write the next
    batch's scores into it.
    """

    name: ClassVar[str] = "given"
    needs_weights: ClassVar[bool] = True

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(scores, requires_grad=False)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32."""
        rows = torch.arange(inputs.rank.shape[0], device=inputs.rank.device)[:, None]
        return self.scores[rows, inputs.rank]

    @classmethod
    def load(cls, options: Mapping[str, Any], weights: Mapping[str, Tensor], width: int, where: str) -> GivenScorer:
        """Over the plan's own tensor; see `Scorer.load` for the errors."""
        if options or set(weights) != {"scores"}:
            raise WeightsError(f"The scorer 'given' {where} takes the weight 'scores' alone.")
        return cls(weights["scores"])
