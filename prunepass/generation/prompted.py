"""The call of a prompt that a stateful program is traced from: what goes in, and what each layer would cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.graph.language_part import CallReader, LanguagePart
from prunepass.graph.vision import language_model_of

__all__ = ["PromptCall", "image_prompt", "text_prompt"]


def text_prompt(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    """Ids, mask and positions [rows, tokens], of no meaning."""
    config: Any = model.config
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % config.get_text_config().vocab_size
    positions = torch.arange(tokens).expand(rows, tokens).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    return {name: value.to(model.device) for name, value in inputs.items()}


def image_prompt(
    model: nn.Module, images: Mapping[str, Any], rows: int, tokens: int, *, marked: bool
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The language model of a vision-language model, and the call of an example, as long and as many rows as wanted."""
    decoder = language_model_of(model)
    assert decoder is not None
    with torch.no_grad():
        call = CallReader.of(model, decoder, images)[1]
    given, length = call["input_ids"].shape
    device = call["input_ids"].device
    row, token = torch.arange(rows, device=device) % given, torch.arange(max(tokens, length), device=device) % length
    inputs = {name: value.index_select(0, row).index_select(1, token) for name, value in call.items()}
    return LanguagePart(model, decoder, marked=marked), inputs


class PromptCall(nn.Module):
    """The model on a prompt: the last token's logits, and what each layer would cache.

    Args:
        all_cached: whether layers of a window return the keys and values of all tokens, too.
    """

    def __init__(self, model: nn.Module, *, all_cached: bool) -> None:
        super().__init__()
        self.all_cached = all_cached
        self.model = model
        self.config = model.config
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache

        # without a configuration it knows no windows; masks still do
        cache = {"past_key_values": DynamicCache()} if self.all_cached else {}
        out = self.model(
            **given,
            use_cache=True,
            return_dict=True,
            **self._last,
            **cache,
        )
        logits = out.logits[:, -1:]
        half = logits.dtype in (torch.float16, torch.bfloat16)  # generators read float32
        found = {"logits": logits.float() if half else logits}
        for i, layer in enumerate(out.past_key_values.layers):
            found |= {f"present_{i}_key": layer.keys, f"present_{i}_value": layer.values}
        return found
