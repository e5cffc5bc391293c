"""Length of the hidden state: the cheapest training-free score."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.scorers.base import ScoreInputs, Scorer, as_scores

__all__ = ["NormScorer"]


class NormScorer(Scorer):
    """``s_j = ||h_j||_2``. Right after a LayerNorm all norms are nearly alike; it suits pre-norm models better."""

    name: ClassVar[str] = "norm"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] norms, float32 or float64."""
        norms: Tensor = torch.linalg.vector_norm(as_scores(inputs.hidden), dim=-1)
        return norms
