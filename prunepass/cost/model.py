"""What a training constraint or a search needs to know of a model's cost, be it FLOPs or seconds."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["CostModel"]


class CostModel(Protocol):
    """Cost of a model's parts as functions of a row's token count, all in one unit (FLOPs, seconds).

    Token counts are floating tensors of any shape and real-valued, because training works with expected counts; every
    cost has the same shape, is never negative and is differentiable in the count. Costs are those of one row.
    """

    @property
    def num_blocks(self) -> int:
        """Number of blocks; they are numbered from 0."""

    def at(self, block: int, n: Tensor) -> Tensor:
        """Cost of one block that runs on ``n`` tokens."""

    def rest(self, n: Tensor) -> Tensor:
        """Cost of what lies outside the blocks (embeddings, head), at the row's unpruned length ``n``."""

    def stage(self, n: Tensor) -> Tensor:
        """Cost of one stage, scoring and selection, that ``n`` tokens reach."""
