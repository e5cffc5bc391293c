"""A token's place in its row: what stays is one end of the row."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunepass.errors import PlanError
from prunepass.scorers.base import ScoreInputs, Scorer

__all__ = ["PositionScorer"]


class PositionScorer(Scorer):
    """Keeps the ``first`` or the ``last`` tokens of each row, protected ones apart. It looks at nothing else.

    For rows that end in nothing: Whisper takes 30 seconds of sound, and what follows a shorter clip is silence. At
    block 0 on text it does what cutting the text does.
    """

    name: ClassVar[str] = "position"

    def __init__(self, keep: Literal["first", "last"] = "first") -> None:
        super().__init__()
        if keep not in ("first", "last"):
            raise PlanError(f"`keep` of the scorer 'position' must be 'first' or 'last', not {keep!r}.")
        self.keep = keep

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32: whole numbers, exact below 2 ** 24."""
        rank = inputs.rank.to(torch.float32)
        return rank if self.keep == "last" else -rank
