"""How far a pruned model's answers are from the dense one's, on a fixed set of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.passes.segments import TYPES_NAME
from prunepass.training.data.heads import Head

__all__ = ["Calibration"]


class Calibration:
    """Rows, and what the dense model says about them.

    Args:
        head: what is compared.
        batches: padded inputs; rows of like length together, so that little is computed on padding.
        dense: the model to compare with; it runs once.
        pairs: whether the rows are pairs of texts; None where only token types can tell.
    """

    def __init__(
        self, head: Head, batches: Sequence[dict[str, Tensor]], dense: nn.Module, *, pairs: bool | None = None
    ) -> None:
        self._head, self._batches, self._pairs = head, list(batches), pairs
        self._answers = [self._run(dense, batch) for batch in self._batches]

    @property
    def rows(self) -> int:
        """How many."""
        return sum(len(next(iter(b.values()))) for b in self._batches)

    def loss(self, model: nn.Module) -> float:
        """Mean divergence over the rows (`Head.divergence`): 0 for the dense model itself."""
        total = 0.0
        for batch, answers in zip(self._batches, self._answers, strict=True):
            total += float(self._head.divergence(self._run(model, batch), answers, batch).sum())
        return total / self.rows

    @property
    def from_embeddings(self) -> bool | None:
        """Whether a search may place stages before the first block, see `methods.search.search`: for spans, yes; for
        one answer to a pair of texts, no, as one has not met the other yet; else None, it is not known here."""
        if self._head.finds_spans:
            return True
        return False if self._head.answers_once and self._has_pairs() else None

    def _has_pairs(self) -> bool:
        if self._pairs is not None:
            return self._pairs
        return any(bool(batch[TYPES_NAME].any()) for batch in self._batches if TYPES_NAME in batch)

    @torch.no_grad()
    def _run(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(**self._head.model_inputs(batch))
