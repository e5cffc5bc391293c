"""Attention of some query rows alone: what scorers share that do not look at all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from prunepass.scorers.base import Attention, as_scores

__all__ = ["attention_of_rows", "slots_of_places"]


def slots_of_places(place: Tensor, counted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of tokens that are told by their places among some tokens of a row.

    Args:
        place: [B, T] int64, how many of those tokens stand up to each slot.
        counted: [B, T] bool, those tokens.
        wanted: [B, n] int64, places from 1 on.

    Returns:
        [B, n] int64 slots, and [B, n] bool, False where a row has no such place.
    """
    hit = ((place[:, None, :] == wanted[:, :, None]) & counted[:, None, :]).to(torch.int64)
    slots = torch.arange(place.shape[1], device=place.device)
    return (hit * slots).sum(dim=2), hit.sum(dim=2) > 0


def attention_of_rows(attention: Attention, index: Tensor) -> Tensor:
    """[B, H, n, T] softmax of the masked scores of queries at the slots ``index``, [B, n]."""
    if attention.probabilities is not None:
        return _at(attention.probabilities, index)
    query, key = attention.query, attention.key
    assert query is not None
    assert key is not None
    scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    query = _at(query, index)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = as_scores(torch.matmul(query * scale, key.transpose(-1, -2)))
    lowest = torch.finfo(scores.dtype).min
    if attention.is_causal:
        slots = torch.arange(key.shape[2], device=key.device)
        scores = scores.masked_fill(slots[None, None, None, :] > index[:, None, :, None], lowest)
    if attention.mask is not None:
        mask = attention.mask if attention.mask.dim() == 4 else attention.mask[None, None]
        if mask.shape[2] != 1:  # else it is the same for all queries
            mask = _at(mask.expand(index.shape[0], -1, -1, -1), index)
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """The rows ``index``, [B, n], of [B, H, T, W]."""
    places = index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
    return values.gather(2, places)
