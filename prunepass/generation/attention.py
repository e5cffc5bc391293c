"""Attention over caches of unequal lengths: what transformers' one mask for all layers becomes in a pruned layer.

transformers builds the mask of a call from the first layer's cache, which is as long as the row. In a layer that was
pruned in the prompt the cache is shorter, and its empty slots (rows keep different numbers of tokens) stand elsewhere.
The pruned graph leaves zeros in empty slots (`passes.cached`), so the mask of such a layer is read off its own keys:
nothing has to be kept beside the cache, which may be copied, reordered by a beam search, or cropped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["install", "mask_of_cache"]


def mask_of_cache(keys: Tensor, mask: Tensor, queries: int) -> Tensor:
    """The mask of a layer whose cache is not as long as the row.

    Args:
        keys: [B, H, K + Q, D], those in the cache and after them those of the call's own tokens; all zero where a slot
            of the cache is empty.
        mask: [B or 1, 1, Q, S], the call's for layers with a full cache: bool, True where attended to, or floating,
            added to the scores. Its last Q columns are the call's own tokens.
        queries: Q.

    Returns:
        [B, 1, Q, K + Q] in the mask's dtype: every filled slot of the cache, then the mask's own last columns.
    """
    rows, cached = keys.shape[0], keys.shape[2] - queries
    filled = (keys[:, 0, :cached] != 0).any(-1)[:, None, None, :]
    if mask.dtype != torch.bool:
        open_, closed = mask.new_zeros(()), mask.new_full((), torch.finfo(mask.dtype).min)
        filled = torch.where(filled, open_, closed)
    own = mask[..., mask.shape[-1] - queries :]
    return torch.cat([filled.expand(rows, 1, queries, cached), own.expand(rows, 1, queries, queries)], dim=-1)


def _misfits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a call with a cache would raise: sizes that do not agree and are not one for all."""
    return mask.shape[-1] != key.shape[2] and mask.shape[-1] != 1 and query.shape[2] < key.shape[2]


def _over_caches(attention: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """The attention given, with a mask that fits the keys where it would not."""
        if attention_mask is not None and _misfits(attention_mask, query, key):
            attention_mask = mask_of_cache(key, attention_mask, query.shape[2])
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    attend.prunepass = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return attend


def install() -> None:
    """Register the attention "sdpa" anew with transformers, where that is in use. It differs only in calls that would
    raise otherwise, as the mask does not fit the keys."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    present = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not getattr(present, "prunepass", False):
        AttentionInterface.register("sdpa", _over_caches(present))
