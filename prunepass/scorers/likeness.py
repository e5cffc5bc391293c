"""How little a token repeats others: for plans that merge, training-free."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.scorers.base import ScoreInputs, Scorer, as_scores

__all__ = ["LikenessScorer"]

#: grids that are told apart: every 2nd, 4th, ... 1024th token
_GRIDS = 10
#: of a token that is compared with none; above any cosine
_ALONE = 2.0
#: scores are held to this, so that equal states have equal scores whatever a matrix product does to their last digits
_STEP = 2.0**-14


class LikenessScorer(Scorer):
    """``s_j = -max cos(h_j, h_i)`` over the tokens i of coarser grids than j's own.

    The coarse tokens are every second one, every fourth and so on. Each is compared with those of coarser grids alone,
    so that of two tokens that are alike one stays. ToMe (arXiv:2210.09461) compares every second token with the others,
    which is the first of these grids, and so merges half of the tokens at most. Takes ``2 T^2 D`` FLOPs a row.

    Leaving tokens have a near one among those kept: meant for stages with ``leave="merge"``.
    """

    name: ClassVar[str] = "likeness"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32 or float64, in [-1, 1], and 2 at tokens that are compared with none."""
        states = as_scores(inputs.hidden)
        if inputs.alive is not None:
            states = torch.where(inputs.alive[..., None], states, 0.0)
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        unit = states / norms.clamp(min=torch.finfo(states.dtype).tiny)
        cosine = unit @ unit.transpose(1, 2)
        grid = _grid(inputs.rank)
        coarser = grid[:, None, :] > grid[:, :, None]
        if inputs.alive is not None:
            coarser = coarser & inputs.alive[:, None, :]
        nearest = torch.where(coarser, cosine, -_ALONE).amax(dim=-1)
        return -(torch.round(nearest / _STEP) * _STEP)


def _grid(rank: Tensor) -> Tensor:
    """[B, T] int64: how often ``rank + 1`` can be halved: 0 at every second token, 1 at every second of the rest."""
    steps = 2 ** torch.arange(1, _GRIDS + 1, device=rank.device)
    return ((rank[..., None] + 1) % steps == 0).to(torch.int64).sum(dim=-1)
