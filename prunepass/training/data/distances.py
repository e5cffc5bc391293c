"""The arithmetic under the heads' losses: in at least float32, over live positions, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["kl", "live", "mean_by_row", "mean_pooled", "wide", "without", "yes_or_no"]


def live(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions of a batch hold a token: bool [B, S]."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kl(student: Tensor, teacher: Tensor, temperature: float, *, dead: Tensor | None = None) -> Tensor:
    """KL(teacher || student) over the last axis of logits [..., C], without positions that are ``dead``: [...]."""
    logits = [wide(x) / temperature for x in (student, teacher.detach())]
    if dead is not None:
        logits = [without(x, dead) for x in logits]
    one, other = (x.log_softmax(-1) for x in logits)
    return F.kl_div(one, other, reduction="none", log_target=True).sum(-1)


def without(logits: Tensor, dead: Tensor) -> Tensor:
    """``logits`` as low as they go where ``dead``; not -inf, as 0 * (inf - inf) is nan."""
    return logits.masked_fill(dead, torch.finfo(logits.dtype).min)


def yes_or_no(logits: Tensor) -> Tensor:
    """A sigmoid as a softmax of two: [...] -> [..., 2]."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1)


def mean_by_row(values: Tensor, where: Tensor) -> Tensor:
    """Means by row of ``values`` [n], which stand at the n places of ``where`` (bool [B, S]); 0 for rows of none."""
    rows = where.nonzero()[:, 0]
    sums = values.new_zeros(where.shape[0]).index_add(0, rows, values)
    return sums / where.sum(1).clamp(min=1)


def mean_pooled(hidden: Tensor, positions: Tensor) -> Tensor:
    """The mean of ``hidden`` [B, S, D] over ``positions`` (bool [B, S]), of length 1: [B, D].

    Where a pruned model restores zeros, this is the direction of the mean over the tokens kept to the end.
    """
    hidden = wide(hidden)
    return F.normalize((hidden * positions.unsqueeze(-1).to(hidden.dtype)).sum(1), dim=-1)  # the count drops out
