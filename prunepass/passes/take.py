"""Gathering along one axis by an index a row, as plain torch functions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["take"]


def take(x: Tensor, index: Tensor, axis: int, batch: int, heads: int = 1, *, shared: bool = False) -> Tensor:
    """``out[b, ..., k, ...] = x[b, ..., index[b, k], ...]`` along ``axis``.

    Args:
        x: has its batch on the axis ``batch``, with ``heads`` folded into it row by row.
        index: [B, K] int64.
        shared: x has one row (size 1 on ``batch``) that all rows of the batch read.

    Returns:
        Of x's dtype and shape, but for K on ``axis`` and, with ``shared``, B on ``batch``.
    """
    rows = index if heads == 1 else index.repeat_interleave(heads, dim=0)
    if shared:
        table = x.squeeze(batch)
        at = axis - (batch < axis)
        picked: Tensor = table.index_select(at, rows.reshape(-1)).unflatten(at, (rows.shape[0], rows.shape[1]))
        return picked.movedim(at, batch)
    if x.dim() == 2:
        return x.gather(axis, rows)
    if (batch, axis) == (0, 1):  # whole rows of a [B, S, ...] value: one lookup in a table of B * S rows
        offsets = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        picked = x.flatten(0, 1).index_select(0, (rows + offsets).reshape(-1))
        whole: Tensor = picked.unflatten(0, (rows.shape[0], rows.shape[1]))
        return whole
    shape = [1] * x.dim()
    shape[batch], shape[axis] = rows.shape
    target = list(x.shape)
    target[axis] = rows.shape[1]
    return x.gather(axis, rows.reshape(shape).expand(target))
