"""Shortening a key-value cache: kept is what the prompt's last tokens attend to, or what the plan's predictors chose.

Pruning leaves each layer the tokens that reached it, in memory and in time; of those a generated token attends to few.
Which, the prompt's own end shows (SnapKV): its last tokens are run once more against the cache, and in every head the
keys with the most attention stay. That run costs what so many tokens cost. The scores of the plan's own predictors cost
nothing more, where the model was compiled to keep them (`generation.decode`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunepass.errors import OptionError, RefusalError
from prunepass.generation.attention import expect_empty_slots, install, mask_of_cache
from prunepass.generation.decode import as_keep, cut, keep_scores, scores_of, taken
from prunepass.plan import Stage

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["compress_cache"]

#: keys and values [B, H, K, D] of each layer
States = list[tuple[Tensor, Tensor]]
#: name of the attention that notes what it attends to
_WATCHED = "prunepass_watched"
#: takes the layer's number and its attention [B, key heads, K] while a window is run again
_NOTE: ContextVar[Callable[[int, Tensor], None]] = ContextVar("prunepass_note")


def compress_cache(
    model: nn.Module,
    cache: DynamicCache,
    input_ids: Tensor | None,
    keep: Any,
    *,
    by: Literal["attention", "predictor"] = "attention",
    attention_mask: Tensor | None = None,
    window: int = 16,
    pool: int = 7,
) -> DynamicCache:
    """A shorter copy of a cache, to go on from with ``model.generate(past_key_values=...)``.

    By "attention", of a prompt's cache. After SnapKV (Li et al. 2024, arXiv:2404.14469): attention of the last
    ``window`` tokens to each key, summed over them and averaged over neighbouring keys and over the query heads that
    share a key head; the best keys of every head and the window itself stay. The first layer's cache stays whole, as
    positions are counted by it.

    By "predictor", of a cache at any time, filled by a model that was compiled with the option ``decode``: the layers
    between one stage and the next keep the tokens with the best scores of that stage's predictor, and what the plan
    protects in the prompt and at the end of the row. Layers before the first stage stay whole, and those of a window.

    Args:
        model: a causal model of transformers, compiled by ``model.compile`` or not; by "attention", with attention
            "sdpa".
        cache: by "attention", of all of ``input_ids``, as the model returned it.
        input_ids: [B, S] int64. By "predictor" they are not needed: None.
        keep: a share in (0, 1]: a float, a fraction, or text such as "2/5". By "attention" of what each layer holds of
            a row, by "predictor" of all tokens of the row so far, or, as a whole number, how many tokens.
        by: "attention" or "predictor".
        attention_mask: [B, S], zero at padding on the left; None where there is none. By "attention" only.
        window: how many of the prompt's last tokens look; all of them must be in every layer's cache, so a plan
            protects as many (``Protect(last=16)``). By "attention" only.
        pool: keys over which attention is averaged, an odd number; 1 for each by itself. By "attention" only.

    Raises:
        OptionError: a window that is empty, longer than a row, or no odd ``pool``; another ``by``; ``keep`` is no share
            and no number, by "predictor"; no ``input_ids``, by "attention".
        PlanError: ``keep`` is no share, by "attention".
        RefusalError: the cache is of another kind or other tokens, lacks some of the window, or has no scores.
    """
    model = getattr(model, "_orig_mod", model)
    if by == "predictor":
        return cast("DynamicCache", _by_scores(cache, as_keep(keep, "keep")))
    if by != "attention":
        raise OptionError(f"by must be 'attention' or 'predictor', not {by!r}.")
    if input_ids is None:
        raise OptionError("compress_cache needs the prompt's input_ids, whose last tokens tell what is attended to.")
    share = Stage(0, keep).keep
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    shortest = int(mask.sum(1).min())
    if not 0 < window < shortest:
        raise OptionError(f"window={window} must be at least 1 and less than the shortest prompt's {shortest} tokens.")
    if pool < 1 or pool % 2 == 0:
        raise OptionError(f"pool={pool} must be an odd number, so that as many keys count on either side.")
    _check(model, cache, input_ids)
    states: States = [(layer.keys, layer.values) for layer in cast("Any", cache).layers]
    attended = _look_again(model, states, input_ids, mask, window)
    return cast("DynamicCache", _shortened(model, states, attended, mask, share, window, pool))


def _by_scores(cache: Any, keep: Fraction | int) -> Any:
    """Each layer that has scores, cut by them."""
    shorter = copy.copy(cache)
    shorter.layers = [copy.copy(layer) for layer in getattr(cache, "layers", ())]  # what stays whole is not copied
    layers = [layer for layer in shorter.layers if scores_of(getattr(layer, "keys", None)) is not None]
    for layer in layers:
        scores = scores_of(layer.keys)
        assert scores is not None
        if (chosen := cut(scores, keep)) is None:
            continue
        kept, index = chosen
        for name in ("keys", "values"):
            setattr(layer, name, taken(getattr(layer, name), index, kept.filled))
            keep_scores(getattr(layer, name), kept)
        if len(kept) >= kept.slots and not bool(kept.filled.all()):
            expect_empty_slots()
    if not layers:
        raise RefusalError(
            "the tokens of this cache have no scores: it was filled by a model that does not keep them, or was moved, "
            "cropped or rebuilt since.",
            hint="Compile the model with options={'plan': ..., 'decode': {'every': None}}, and give the cache that its "
            "calls return; or cut by='attention'.",
        )
    return shorter


def _check(model: Any, cache: Any, input_ids: Tensor) -> None:
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())} or {type(cache).__name__}
    if kinds != {"DynamicLayer"}:
        raise RefusalError(
            f"a cache of {', '.join(sorted(kinds))} cannot be shortened at chosen tokens.",
            hint="Take the dynamic cache, transformers' default, of a model whose layers all attend to the whole text.",
        )
    if model.config._attn_implementation != "sdpa":
        raise RefusalError(
            f"the model's attention is {model.config._attn_implementation!r}.",
            hint="Load it with attn_implementation='sdpa'.",
        )
    length = cache.layers[0].keys.shape[2]
    if length != input_ids.shape[1]:
        raise RefusalError(
            f"the cache holds {length} tokens and input_ids has {input_ids.shape[1]}.",
            hint="Pass the cache as the call on exactly these tokens returned it.",
        )


def _look_again(model: Any, states: States, ids: Tensor, mask: Tensor, window: int) -> list[Tensor]:
    """Attention [B, key heads, K] of the window to each layer's slots, by running the window on what was before it."""
    earlier = _cache(model, [(keys[:, :, :-window], values[:, :, :-window]) for keys, values in states])
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -window:]
    found: dict[int, Tensor] = {}
    with _watching(model, found.__setitem__), torch.no_grad():
        model.forward(
            input_ids=ids[:, -window:],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=earlier,
            use_cache=True,
        )
    for i, ((keys, _), again) in enumerate(zip(states, earlier.layers, strict=True)):
        if not _same(keys[:, :, -window:], again.keys[:, :, -window:]):
            raise RefusalError(
                f"the last {window} tokens are not the last slots of layer {i}'s cache: some were pruned, or the cache "
                "is another text's.",
                hint=f"Let the plan protect them, Protect(last={window}), or take a smaller window.",
            )
    return [found[i] for i in range(len(states))]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether each slot of [B, H, W, D] holds the same token's key, up to rounding, which differs with what else is
    computed beside it; another token's key is off by as much as keys are long."""
    off, size = ((x.float().abs().mean(dim=(1, 3))) for x in (a - b, a))
    return bool((off <= 4 * torch.finfo(a.dtype).eps ** 0.5 * size).all())


@contextmanager
def _watching(model: Any, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """This model's attention is noted down meanwhile."""
    _register()
    config, token = model.config, _NOTE.set(note)
    config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _NOTE.reset(token)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    install()
    AttentionInterface.register(_WATCHED, _watched)
    AttentionMaskInterface.register(_WATCHED, sdpa_mask)


def _watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Transformers' attention "sdpa", which also notes how much the queries [B, H, Q, D] attend to each key."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    queries = query.shape[2]
    if mask is not None and mask.shape[-1] != key.shape[2]:
        mask = mask_of_cache(key, mask, queries)
    groups = query.shape[1] // key.shape[1]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    scores = (query.float() * scale) @ key.float().repeat_interleave(groups, 1).transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    attended = scores.softmax(-1).sum(2).unflatten(1, (-1, groups)).mean(2)
    _NOTE.get()(module.layer_idx, attended)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def _shortened(
    model: Any, states: States, attended: list[Tensor], mask: Tensor, share: Fraction, window: int, pool: int
) -> Any:
    layers = states[:1]
    for (keys, values), found in zip(states[1:], attended[1:], strict=True):
        # a layer that was not pruned has padding where the row has; in others, empty slots are zeros
        live = mask != 0 if keys.shape[2] == mask.shape[1] else (keys[:, 0] != 0).any(-1)
        counts = (live.sum(1) * share.numerator + share.denominator - 1) // share.denominator - window
        index = _best(found[:, :, :-window], live[:, :-window], counts.clamp(min=1), pool)
        layers.append((_taken(keys, index, window), _taken(values, index, window)))
    return _cache(model, layers)


def _best(attended: Tensor, live: Tensor, counts: Tensor, pool: int) -> Tensor:
    """Which slots each head keeps of its row, ascending.

    Args:
        attended: [B, H, K].
        live: [B, K] bool.
        counts: [B] int64, how many to keep of each row.

    Returns:
        [B, H, K'] int64 for the greatest count K'; rows with less begin with -1.
    """
    means = _smoothed(attended, live, pool).masked_fill(~live[:, None], -math.inf)
    widest = int(counts.max())
    best = torch.sort(means, dim=-1, descending=True, stable=True).indices[..., :widest]
    surplus = torch.arange(widest, device=live.device) >= counts[:, None, None]
    return best.masked_fill(surplus, -1).sort(-1).values


def _smoothed(attended: Tensor, live: Tensor, pool: int) -> Tensor:
    """Means over ``pool`` neighbours among the row's live slots, so that empty ones between them change nothing."""
    order = torch.sort(live.to(torch.int64), dim=1, stable=True).indices[:, None].expand_as(attended)
    filled = live[:, None].expand_as(attended).gather(2, order).to(attended.dtype)
    sums, counts = (
        functional.avg_pool1d(x, pool, stride=1, padding=pool // 2)
        for x in (attended.gather(2, order) * filled, filled)
    )
    return torch.zeros_like(attended).scatter(2, order, sums / counts.clamp(min=1e-9))


def _taken(x: Tensor, index: Tensor, window: int) -> Tensor:
    """The slots ``index`` of [B, H, K, D] and the window after them; zeros where there is none, which masks go by."""
    places = index[..., None].expand(-1, -1, -1, x.shape[-1])
    chosen = x[:, :, :-window].gather(2, places.clamp(min=0))
    return torch.cat([torch.where(places >= 0, chosen, torch.zeros_like(chosen)), x[:, :, -window:]], dim=2)


def _cache(model: Any, layers: States) -> Any:
    from transformers import DynamicCache

    made = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(layers):
        made.update(keys, values, i)
    return made
