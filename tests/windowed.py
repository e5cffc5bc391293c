"""Tiny causal models whose layers attend in a window, some or all of them, as `zoo` has those of other kinds."""

from __future__ import annotations

from typing import Any

import zoo
from zoo import Species

WINDOW = 9
_KINDS: dict[str, Any] = {"sliding_window": WINDOW, "num_hidden_layers": 3}
_FULL_LAST = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_LLAMA = zoo.SPECIES["llama"].options

#: layers of a window before and after those of the whole text, and models that have no other
WINDOWED: dict[str, Species] = {
    "mistral": Species("mistral", _LLAMA | _KINDS, causal=True),
    "gemma2": Species(
        "gemma2",
        _LLAMA
        | _KINDS
        | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        causal=True,
    ),
    "gemma3": Species("gemma3_text", _LLAMA | _KINDS | _FULL_LAST | {"query_pre_attn_scalar": 8}, causal=True),
    "cohere2": Species("cohere2", _LLAMA | _KINDS | _FULL_LAST, causal=True),
    "olmo3": Species("olmo3", _LLAMA | _KINDS | _FULL_LAST, causal=True),
    "gpt_oss": Species(
        "gpt_oss",
        _LLAMA
        | _KINDS
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        causal=True,
    ),
    "qwen2": Species("qwen2", _LLAMA | _KINDS | _FULL_LAST | {"use_sliding_window": True}, causal=True),
}


def windowed(name: str, **options: Any) -> Any:
    """A causal model with its cache, in float64 where nothing else is said."""
    return zoo.tiny(WINDOWED[name], "causal", **{"use_cache": True, "eos_token_id": None, **options})
