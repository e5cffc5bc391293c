"""Caches shortened after the prompt, alone and on top of pruning."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import prunepass
import zoo
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.errors import OptionError, PlanError, RefusalError

WINDOW = 4
PLAN = PrunePlan([Stage(1, 0.8), Stage(2, 0.6)], ScorerSpec("norm"), Protect(first=1, last=WINDOW))
NEW = 4


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def decoder(name: str = "llama", **options: Any) -> Any:
    return zoo.tiny(name, "causal", **{"use_cache": True, "eos_token_id": None, **options})


def pruned(name: str = "llama") -> Any:
    model = decoder(name)
    model.compile(backend="tokprune", options={"plan": PLAN, "target": "eager"})
    return model


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", name="left")
def _left() -> tuple[Any, DynamicCache]:
    """A pruned model and the cache of a prompt of 25 tokens."""
    model = pruned()
    return model, after(model, prompts(2, 25))


def after(model: Any, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        cache: DynamicCache = model(input_ids=ids, **extra).past_key_values
    return cache


def going_on(model: Any, cache: DynamicCache, ids: Tensor, mask: Tensor | None = None) -> Any:
    """A prompt that was cached, and one more token, which starts the continuation."""
    ids = torch.cat([ids, torch.full_like(ids[:, :1], 7)], 1)
    mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=0, **options)


def kept_slots(whole: DynamicCache, short: DynamicCache) -> list[Tensor]:
    """[B, H, K] of each layer: which slots are there still."""
    return [
        (a.keys[:, :, :, None] == b.keys[:, :, None]).all(-1).any(-1)
        for a, b in zip(whole.layers, short.layers, strict=True)
    ]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_heads_keep_the_keys_that_the_window_attends_to(name: str) -> None:
    ids = prompts(2, 21)
    whole = after(decoder(name), ids)
    short = prunepass.compress_cache(decoder(name), whole, ids, "1/2", window=WINDOW, pool=1)
    eager = decoder(name, attention="eager")
    with torch.no_grad():
        exact = eager(input_ids=ids, output_attentions=True).attentions
    for i, kept in enumerate(kept_slots(whole, short)):
        if i == 0:
            assert kept.all()
            continue
        assert (kept.sum(-1) == 11).all()
        assert kept[..., -WINDOW:].all()
        heads = kept.shape[1]
        attended = exact[i][:, :, -WINDOW:].sum(2).unflatten(1, (heads, -1)).mean(2)[..., :-WINDOW]
        best = attended.topk(11 - WINDOW).indices
        wanted = torch.zeros_like(attended, dtype=torch.bool).scatter(-1, best, True)
        assert torch.equal(kept[..., :-WINDOW], wanted)


def hidden_keys(model: nn.Module, ids: Tensor, kept: list[Tensor], prompt: int) -> Tensor:
    """[B, V] logits of the next token without a cache: what follows the prompt does not see the keys that were dropped,
    head by head."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    handles = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block, seen in zip(blocks, kept, strict=True):
        heads = model.config.num_attention_heads // seen.shape[1]
        mask = causal.expand(len(ids), seen.shape[1] * heads, -1, -1).clone()
        mask[:, :, prompt:, :prompt] &= seen.repeat_interleave(heads, 1)[:, :, None]

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            extra = given.arguments.pop("kwargs", {})
            return (), {**given.arguments, **extra, "attention_mask": mask}

        handles.append(block.register_forward_pre_hook(give, with_kwargs=True))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    return logits


def test_what_follows_sees_the_kept_keys_only() -> None:
    ids = prompts(2, 21)
    model = decoder()
    whole = after(model, ids)
    short = prunepass.compress_cache(model, whole, ids, 0.5, window=WINDOW)
    kept = kept_slots(whole, short)
    found = going_on(model, short, ids)
    for step, logits in enumerate(found.logits):
        exact = hidden_keys(decoder(use_cache=False), found.sequences[:, : 22 + step], kept, 21)
        assert (logits - exact).abs().max() < 1e-6
    assert (found.logits[0] - going_on(model, whole, ids).logits[0]).abs().max() > 1e-4


def test_it_shortens_what_pruning_left() -> None:
    ids = prompts(2, 25)
    model = pruned()
    cache = after(model, ids)
    before = [layer.keys.shape[2] for layer in cache.layers]
    short = prunepass.compress_cache(model, cache, ids, "1/2", window=WINDOW)
    assert before == [25, 20, 15, 15]
    assert [layer.keys.shape[2] for layer in short.layers] == [25, 10, 8, 8]
    assert [layer.keys.shape[2] for layer in cache.layers] == before
    assert going_on(model, short, ids).sequences.shape == (2, 26 + NEW)


def test_all_kept_changes_nothing() -> None:
    ids = prompts(2, 25)
    model = pruned()
    short = prunepass.compress_cache(model, after(model, ids), ids, 1, window=WINDOW)
    one, two = (going_on(model, cache, ids).logits for cache in (short, after(model, ids)))
    assert torch.equal(torch.stack(one), torch.stack(two))


@pytest.mark.parametrize("make", [decoder, pruned])
def test_alone_as_in_a_padded_batch(make: Any) -> None:
    ids = prompts(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    model = make()
    together = prunepass.compress_cache(model, after(model, ids, mask), ids, 0.5, attention_mask=mask, window=WINDOW)
    both = torch.stack(going_on(model, together, ids, mask).logits)
    own, model = ids[1:, 9:], make()
    alone = prunepass.compress_cache(model, after(model, own), own, 0.5, window=WINDOW)
    assert (torch.stack(going_on(model, alone, own).logits)[:, 0] - both[:, 1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"window": 0}, OptionError, "at least 1"),
        ({"window": 30}, OptionError, "shortest prompt's 25"),
        ({"pool": 4}, OptionError, "odd"),
        ({"keep": 1.5}, PlanError, "1.5"),
        ({"window": WINDOW + 2}, RefusalError, r"Protect\(last=6\)"),
        ({"input_ids": prompts(2, 24)}, RefusalError, "holds 25 tokens"),
        ({"input_ids": prompts(2, 25).flip(1)}, RefusalError, "another text"),
    ],
)
def test_what_cannot_be_done_is_refused(
    left: tuple[Any, DynamicCache], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model, cache = left
    given: dict[str, Any] = {"input_ids": prompts(2, 25), "keep": 0.5, "window": WINDOW, **options}
    with pytest.raises(error, match=says):
        prunepass.compress_cache(model, cache, **given)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_is_told_from_another_in_low_precision(dtype: torch.dtype) -> None:
    ids = prompts(2, 25)
    model = decoder(dtype=dtype)
    cache = after(model, ids)
    short = prunepass.compress_cache(model, cache, ids, 0.5, window=WINDOW)
    assert [layer.keys.shape[2] for layer in short.layers] == [25, 13, 13, 13]
    other = ids.clone()
    other[1, -2] += 1
    with pytest.raises(RefusalError, match="another text"):
        prunepass.compress_cache(model, cache, other, 0.5, window=WINDOW)


def test_other_caches_and_attentions_are_refused() -> None:
    ids = prompts(1, 20)
    model = decoder()
    with pytest.raises(RefusalError, match="StaticLayer"):
        prunepass.compress_cache(model, StaticCache(config=model.config, max_cache_len=20), ids, 0.5)  # type: ignore[arg-type]  # the mistake itself
    eager = decoder(attention="eager")
    with pytest.raises(RefusalError, match="attn_implementation='sdpa'"):
        prunepass.compress_cache(eager, after(eager, ids), ids, 0.5)
