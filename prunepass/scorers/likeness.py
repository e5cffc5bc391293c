"""How little a token repeats others: for plans that merge, training-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunepass.errors import PlanError, RefusalError
from prunepass.scorers.base import Hosts, ScoreInputs, Scorer, as_scores

__all__ = ["LikenessScorer"]

#: grids that are told apart: every 2nd, 4th, ... 1024th token
_GRIDS = 10
#: of a token that is compared with none; above any cosine
_ALONE = 2.0
#: scores are held to this, so that equal states have equal scores whatever a matrix product does to their last digits
_STEP = 2.0**-14
#: what tokens may be compared by, and with which
_BY = ("states", "keys")
_SETS = ("grids", "two")


class LikenessScorer(Scorer):
    """``s_j = -max cos(v_j, v_i)`` over the tokens i that j is compared with.

    With ``sets="grids"`` those are the tokens of coarser grids than its own: every second one, every fourth and so on,
    so that of two tokens that are alike one stays, whatever share of them leaves. With ``sets="two"`` every second
    token is compared with the others, as ToMe does (arXiv:2210.09461, section 3), and merged into one of these alone:
    better where few leave at a time; from half of the tokens on, the earlier ones stay. Takes ``2 T^2 W`` FLOPs a row,
    W being the width of v.

    Leaving tokens have a near one among those kept: meant for stages with ``leave="merge"``.

    Args:
        by: what v is, here and where hosts are found: "states", the hidden states (W = D); or "keys", the keys of the
            attention before the cut, averaged over heads (W = D / H), as in ToMe. Those are there already: of the block
            before, or with ``Stage(after_attention=True)``, ToMe's place, of the block itself.
        sets: "grids" or "two".

    Raises:
        PlanError: ``by`` or ``sets`` is none of these.
    """

    name: ClassVar[str] = "likeness"
    #: tokens of the higher of two levels have the highest scores: one of them stays before any other
    has_hosts_for_all: ClassVar[bool] = True

    def __init__(self, by: str = "states", sets: str = "grids") -> None:
        super().__init__()
        for option, value, known in (("by", by, _BY), ("sets", sets, _SETS)):
            if value not in known:
                raise PlanError(f"The scorer 'likeness' takes {option} as one of {', '.join(known)}, not {value!r}.")
        self.by, self.sets = by, sets
        self.needs_attention = by == "keys"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32 or float64, in [-1, 1], and 2 at tokens that are compared with none."""
        keys = self._keys(inputs)
        compared = as_scores(inputs.hidden if keys is None else keys)
        if inputs.alive is not None:
            compared = torch.where(inputs.alive[..., None], compared, 0.0)
        norms = torch.linalg.vector_norm(compared, dim=-1, keepdim=True)
        unit = compared / norms.clamp(min=torch.finfo(compared.dtype).tiny)
        if self.sets == "two" and inputs.alive is None and inputs.tokens is not None and inputs.tokens > 1:
            nearest = _nearest_odd(unit, inputs.tokens)
        else:
            cosine = unit @ unit.transpose(1, 2)
            level = self._levels(inputs)
            higher = level[:, None, :] > level[:, :, None]
            if inputs.alive is not None:
                higher = higher & inputs.alive[:, None, :]
            nearest = torch.where(higher, cosine, -_ALONE).amax(dim=-1)
        return -(torch.round(nearest / _STEP) * _STEP)

    def hosts(self, inputs: ScoreInputs) -> Hosts:
        """By keys where those are compared; of the other set where there are two.

        Raises:
            RefusalError: the model computes the probabilities of its attention itself.
        """
        return Hosts(self._keys(inputs), self._levels(inputs) if self.sets == "two" else None)

    @classmethod
    def reads_attention(cls, options: Mapping[str, Any]) -> bool:
        """Where it compares by keys."""
        return options.get("by") == "keys"

    def _keys(self, inputs: ScoreInputs) -> Tensor | None:
        if self.by == "states":
            return None
        assert inputs.attention is not None
        if inputs.attention.key is None:
            raise RefusalError(
                "the scorer 'likeness' reads the keys of fused attention, and this model computes the probabilities of "
                "its attention itself.",
                hint="Compare by states: {'name': 'likeness', 'by': 'states'}.",
            )
        return inputs.attention.key.mean(dim=1)

    def _levels(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] int64: tokens are compared with those of higher levels."""
        if self.sets == "grids":
            return _grid(inputs.rank)
        if inputs.alive is None:  # by place among the tokens that are left, so that either set has half of them
            return (torch.arange(inputs.rank.shape[1], device=inputs.rank.device) % 2)[None, :] + inputs.rank * 0
        return (torch.cumsum(inputs.alive.to(torch.int64), dim=1) - 1) % 2


def _nearest_odd(unit: Tensor, tokens: int) -> Tensor:
    """[B, T]: the cosine of each token at an even place to the nearest one at an odd place, and -2 at odd places. The
    same as by levels, from a quarter of the pairs."""
    nearest = (unit[:, 0:tokens:2] @ unit[:, 1:tokens:2].transpose(1, 2)).amax(dim=-1)
    both = torch.stack([nearest, torch.full_like(nearest, -_ALONE)], dim=2)
    return both.flatten(1)[:, :tokens]


def _grid(rank: Tensor) -> Tensor:
    """[B, T] int64: how often ``rank + 1`` can be halved: 0 at every second token, 1 at every second of the rest."""
    steps = 2 ** torch.arange(1, _GRIDS + 1, device=rank.device)
    return ((rank[..., None] + 1) % steps == 0).to(torch.int64).sum(dim=-1)
