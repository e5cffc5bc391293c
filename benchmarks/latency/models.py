"""Models of well-known shapes with random weights, whole or cut to their first blocks, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from prunepass.errors import OptionError

SEED = 0
#: ids below it are special tokens in most vocabularies
_FIRST_ID = 1000


@dataclass(frozen=True)
class Shape:
    """A model to be built.

    Attributes:
        config: makes the configuration; takes ``num_hidden_layers``.
        blocks: how many the whole model has.
        longest: tokens of a row at most.
    """

    name: str
    config: Callable[..., Any]
    blocks: int
    longest: int

    def build(self, blocks: int | None = None) -> nn.Module:
        """The model without a head, float32, in evaluation mode; with fewer ``blocks`` than it has, where given."""
        torch.manual_seed(SEED)
        config = self.config(num_hidden_layers=blocks or self.blocks)
        model: nn.Module = transformers.AutoModel.from_config(config, dtype=torch.float32)
        return model.eval()


#: a Llama of 1.1 billion weights in 22 blocks, the vocabulary being the default of 32,000
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
_PREFILL: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "use_cache": False,
}  # the pass over a whole prompt is what is pruned

MODELS: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "minilm-l6",
            partial(transformers.BertConfig, hidden_size=384, num_attention_heads=12, intermediate_size=1536),
            6,
            512,
        ),
        Shape("bert-base", transformers.BertConfig, 12, 512),
        Shape(
            "bert-large",
            partial(transformers.BertConfig, hidden_size=1024, num_attention_heads=16, intermediate_size=4096),
            24,
            512,
        ),
        Shape("modernbert-base", transformers.ModernBertConfig, 22, 8192),
        Shape("llama-1b", partial(transformers.LlamaConfig, **LLAMA_1B, **_PREFILL), 22, 2048),
    )
}


def find_model(name: str) -> Shape:
    """The model called ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in MODELS:
        raise OptionError(f"There is no model {name!r}; there are {', '.join(MODELS)}.")
    return MODELS[name]


def inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all live: ``input_ids`` and ``attention_mask``, both int64 [batch, length], where the model is."""
    generator = torch.Generator().manual_seed(SEED)
    config: Any = model.config
    vocabulary = int(config.vocab_size)
    ids = torch.randint(min(_FIRST_ID, vocabulary // 2), vocabulary, (batch, length), generator=generator)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
