"""Attention over caches of unequal lengths: what transformers' one mask for all layers becomes in a pruned layer.

transformers builds the mask of a call from the first layer's cache, which is as long as the row. In a layer that was
pruned in the prompt the cache is shorter, and its empty slots (rows keep different numbers of tokens) stand elsewhere.
The pruned graph leaves zeros in empty slots (`passes.cached`), so the mask of such a layer is read off its own keys:
nothing has to be kept beside the cache, which may be copied, reordered by a beam search, or cropped by tokens that came
after the prompt. Cropped into the prompt it loses as many slots in each layer, which stand for other tokens there.

Caches that hold a window have a slot for each position in it (`passes.windows`). The mask fits those, and their empty
slots, zeros as well, are hidden in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunepass.errors import RefusalError

__all__ = ["attend_over_caches", "expect_empty_slots", "filled_slots", "install", "mask_of_cache"]

#: whether a graph that ran in this process returned caches with empty slots where the masks fit
_empty_slots = False


def expect_empty_slots() -> None:
    """From now on, calls with a cache look for empty slots also where the mask fits the keys. That costs a look at one
    head's keys, so it is not done before there can be any."""
    global _empty_slots  # of the process, as what is registered with transformers is
    _empty_slots = True


def _filled(keys: Tensor) -> Tensor:
    """[B, 1, 1, K] bool: which slots of [B, H, K, D] hold a key. It is all zeros where one is empty."""
    return (keys[:, 0] != 0).any(-1)[:, None, None, :]


def _as_mask(seen: Tensor, like: Tensor) -> Tensor:
    """What is seen, as a mask of the dtype of another: bool, or floating, to be added to the scores."""
    if like.dtype == torch.bool:
        return seen
    return torch.where(seen, like.new_zeros(()), like.new_full((), torch.finfo(like.dtype).min))


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
    filled = _as_mask(_filled(keys[:, :, :cached]), mask)
    own = mask[..., mask.shape[-1] - queries :]
    return torch.cat([filled.expand(rows, 1, queries, cached), own.expand(rows, 1, queries, queries)], dim=-1)


def filled_slots(keys: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a layer whose cache has a slot for each position that the mask has, with the empty ones hidden.

    Args:
        keys: [B, H, K, D], all zero where a slot is empty.
        mask: [B or 1, 1, Q, K], as for `mask_of_cache`; None where all keys are seen.

    Returns:
        [B, 1, Q or 1, K] in the mask's dtype, or bool.
    """
    filled = _filled(keys)
    if mask is None:
        return filled
    if mask.dtype == torch.bool:
        return mask & filled
    return torch.where(filled, mask, torch.finfo(mask.dtype).min)


def _misfits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a call with a cache would raise: sizes that do not agree and are not one for all."""
    return mask.shape[-1] != key.shape[2] and mask.shape[-1] != 1 and query.shape[2] < key.shape[2]


def _refuse_memory(module: Any, mask: Tensor, key: Tensor) -> None:
    """Raises `RefusalError` for cross-attention to states of an encoder that are not as many as the mask says: which of
    them hold no token only their own mask tells."""
    config = getattr(module, "config", None)
    if getattr(module, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return  # the latter is PaliGemma's: attention to itself, of which masks say what is seen
    raise RefusalError(
        f"a decoder attends to {key.shape[2]} states of an encoder with a mask of {mask.shape[-1]} tokens.",
        where=type(module).__name__,
        hint="States of an encoder that was pruned with restore='none' have a mask of their own: pass it to the "
        "decoder as attention_mask. generate() does so by itself where it calls the encoder.",
    )


def attend_over_caches(
    attention: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention given, with a mask that fits the keys and hides empty slots."""
    queries = query.shape[2]
    if attention_mask is not None and _misfits(attention_mask, query, key):
        _refuse_memory(module, attention_mask, key)
        attention_mask = mask_of_cache(key, attention_mask, queries)
    elif queries < key.shape[2] and (attention_mask is not None or queries == 1) and _empty_slots:
        attention_mask = filled_slots(key, attention_mask)
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


def _interface(given: Callable[..., Any]) -> Callable[..., Any]:
    """How a model looks its attention up; "eager" is a function of the model's own file, which it names itself."""

    def get_interface(self: Any, attn_implementation: Any, default: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any] = given(self, attn_implementation, default)
        return partial(attend_over_caches, found) if attn_implementation == "eager" else found

    get_interface.prunepass = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return get_interface


def install() -> None:
    """Register the attention "sdpa" anew with transformers, and its look-up of "eager", where that is in use. They
    differ only in calls that would raise otherwise, as the mask does not fit the keys, and as `expect_empty_slots`
    says."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    present = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(present, "func", None) is not attend_over_caches:
        AttentionInterface.register("sdpa", partial(attend_over_caches, present))
    look_up = AttentionInterface.get_interface
    if not getattr(look_up, "prunepass", False):
        setattr(AttentionInterface, "get_interface", _interface(look_up))  # noqa: B010  # mypy allows no assignment
