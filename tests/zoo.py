"""Tiny random models of many architectures: seeded, float64, no dropout, no cache. One line an architecture.

The sizes differ from one another on purpose, so that an axis cannot be taken for another one by accident; tests of
such collisions set them equal one at a time. All parameters are drawn at random, layer-norm weights and biases too:
a freshly initialised layer norm would give every token the same norm, and a scorer nothing to choose by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN, HEADS, HEAD_SIZE, INTERMEDIATE, VOCABULARY, LAYERS, POSITIONS = 32, 4, 8, 40, 97, 4, 64
PAD = 1  # a pad id that every architecture accepts; no random text holds it

_BERT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_SIZE,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "attention_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GPT2: dict[str, Any] = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": INTERMEDIATE,
    "n_layer": LAYERS,
    "vocab_size": VOCABULARY,
    "n_positions": POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


@dataclass(frozen=True)
class Species:
    """One architecture: its `transformers` model type, a tiny configuration, and what its text input may look like.

    Args:
        positions: where a token's position comes from. ``"input"``: from ``position_ids`` (counted from the padded
            start when not given). ``"pad"``: from the pad tokens (RoBERTa). ``"relative"``: from distances alone, or
            from nothing.
        causal: whether attention looks backwards only.
        position_ids: whether ``forward`` takes them.
        mask: whether ``forward`` takes an attention mask.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    positions: str = "input"
    causal: bool = False
    position_ids: bool = True
    mask: bool = True


_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

SPECIES: dict[str, Species] = {
    # encoders
    "bert": Species("bert", _BERT),
    "roberta": Species("roberta", _BERT, positions="pad"),
    "xlm-roberta": Species("xlm-roberta", _BERT, positions="pad"),
    "camembert": Species("camembert", _BERT, positions="pad"),
    "electra": Species("electra", _BERT | {"embedding_size": 24}),
    "albert": Species("albert", _BERT | {"embedding_size": 24, "classifier_dropout_prob": 0.0}),
    "mpnet": Species("mpnet", _BERT, positions="pad"),
    "distilbert": Species(
        "distilbert",
        {
            "dim": HIDDEN,
            "n_heads": HEADS,
            "hidden_dim": INTERMEDIATE,
            "n_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": PAD,
        },
    ),
    "deberta-v2": Species(
        "deberta-v2",
        _BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 6,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        positions="relative",
    ),
    "modernbert": Species(
        "modernbert",
        {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "pad_token_id": PAD,
        },
    ),
    "eurobert": Species("eurobert", _LLAMA),
    "roformer": Species("roformer", _BERT | {"embedding_size": HIDDEN}),
    "layoutlm": Species("layoutlm", _BERT),
    "megatron-bert": Species("megatron-bert", _BERT),
    "nomic_bert": Species("nomic_bert", _LLAMA),
    "esm": Species("esm", _BERT | {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 4}),
    "xlm": Species(
        "xlm",
        {
            "emb_dim": HIDDEN,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "n_words": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": PAD,
            "use_lang_emb": False,
        },
    ),
    "mobilebert": Species(
        "mobilebert",
        _BERT | {"embedding_size": 24, "intra_bottleneck_size": 16, "normalization_type": "layer_norm"},
    ),
    "rembert": Species("rembert", _BERT | {"input_embedding_size": 24, "output_embedding_size": 24}),
    "roberta-prelayernorm": Species("roberta-prelayernorm", _BERT, positions="pad"),
    # decoders, without cache
    "gptj": Species("gptj", _GPT2 | {"rotary_dim": 4}, causal=True),
    "codegen": Species("codegen", _GPT2 | {"rotary_dim": 4}, causal=True),
    "gpt2": Species("gpt2", _GPT2, causal=True),
    "ctrl": Species("ctrl", _GPT2 | {"dff": INTERMEDIATE}, causal=True),
    "opt": Species(
        "opt",
        {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "ffn_dim": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": HIDDEN,
            "dropout": 0.0,
            "use_cache": False,
            "pad_token_id": PAD,
        },
        positions="pad",
        causal=True,
    ),
    "bloom": Species(
        "bloom",
        {
            "hidden_size": HIDDEN,
            "n_head": HEADS,
            "n_layer": LAYERS,
            "vocab_size": VOCABULARY,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "use_cache": False,
            "pad_token_id": PAD,
        },
        positions="relative",
        causal=True,
        position_ids=False,
    ),
    "gpt_neox": Species(
        "gpt_neox",
        _LLAMA | {"rotary_pct": 0.5, "hidden_dropout": 0.0, "use_parallel_residual": True},
        causal=True,
    ),
    "llama": Species("llama", _LLAMA, causal=True),
    "qwen2": Species("qwen2", _LLAMA, causal=True),
    "qwen3": Species("qwen3", _LLAMA, causal=True),
    "mistral": Species("mistral", _LLAMA | {"sliding_window": 5}, causal=True),
    "gemma": Species("gemma", _LLAMA, causal=True),
    "gemma2": Species("gemma2", _LLAMA | {"sliding_window": 5, "query_pre_attn_scalar": 8}, causal=True),
    "gemma3": Species(
        "gemma3_text",
        _LLAMA
        | {
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
        causal=True,
    ),
    "phi": Species("phi", _LLAMA | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}, causal=True),
    "olmo2": Species("olmo2", _LLAMA, causal=True),
    "granite": Species("granite", _LLAMA, causal=True),
    "cohere": Species("cohere", _LLAMA, causal=True),
    "stablelm": Species("stablelm", _LLAMA, causal=True),
    "phi3": Species("phi3", _LLAMA, causal=True),
    "mixtral": Species("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, causal=True),
    "qwen3_moe": Species("qwen3_moe", _LLAMA | _EXPERTS, causal=True),
}

# Tested by default; the others of `SPECIES` are a `slow` test each.
EVERY_DAY = (
    "bert",
    "roberta",
    "electra",
    "albert",
    "mpnet",
    "distilbert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "bloom",
    "gpt_neox",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "xlm",
)

# Architectures with something over the sequence that pruning cannot pass: a refusal is the right answer.
UNPRUNABLE: dict[str, Species] = {
    "convbert": Species("convbert", _BERT | {"embedding_size": HIDDEN, "conv_kernel_size": 3, "head_ratio": 2}),
    "fnet": Species(
        "fnet",
        {k: v for k, v in _BERT.items() if k not in ("num_attention_heads", "attention_probs_dropout_prob")},
        mask=False,
    ),
    "funnel": Species(
        "funnel",
        {
            "architectures": ["FunnelModel"],
            "block_sizes": [2, 2],
            "d_model": HIDDEN,
            "n_head": HEADS,
            "d_head": HEAD_SIZE,
            "d_inner": INTERMEDIATE,
            "vocab_size": VOCABULARY,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
    ),
    "mamba": Species(
        "mamba",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "state_size": 4,
            "use_cache": False,
            "pad_token_id": PAD,
        },
    ),
}

_BART: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "use_cache": False,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "d_model": HIDDEN,
    "d_kv": HEAD_SIZE,
    "d_ff": INTERMEDIATE,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "use_cache": False,
    "pad_token_id": PAD,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}

# An encoder whose tokens a decoder reads; plans prune the encoder's.
ENCODER_DECODERS: dict[str, Species] = {
    "bart": Species("bart", _BART),
    "mbart": Species("mbart", _BART),
    "mvp": Species("mvp", _BART),
    "plbart": Species("plbart", _BART),
    "pegasus": Species("pegasus", _BART),
    "marian": Species("marian", _BART | {"decoder_vocab_size": VOCABULARY}),
    "m2m_100": Species("m2m_100", _BART, positions="pad"),
    "blenderbot": Species("blenderbot", _BART),
    "t5": Species("t5", _T5, positions="relative"),
    "mt5": Species("mt5", _T5, positions="relative"),
    "umt5": Species("umt5", _T5, positions="relative"),
}

HEADS_OF: dict[str, str] = {
    "base": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def heads_of(name: str) -> list[str]:
    """The heads that `transformers` offers for an architecture, as keys of `HEADS_OF`."""
    from transformers.models.auto import modeling_auto as auto

    offers = {
        "base": auto.MODEL_MAPPING_NAMES,
        "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "question": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    model_type = (SPECIES | ENCODER_DECODERS)[name].model_type
    return [head for head, names in offers.items() if model_type in names]


def by_day(names: Iterable[str] = SPECIES) -> list[Any]:
    """Test parameters: architectures, those not in `EVERY_DAY` marked slow."""
    return [pytest.param(n, marks=() if n in EVERY_DAY else pytest.mark.slow) for n in names]


def tiny(
    name: str | Species,
    head: str = "base",
    *,
    seed: int = 0,
    attention: str | None = None,
    dtype: Any = torch.float64,
    **options: Any,
) -> nn.Module:
    """A tiny random model of architecture ``name``, in eval mode.

    Args:
        name: a key of `SPECIES`, `ENCODER_DECODERS` or `UNPRUNABLE`, or a species that is in none.
        head: a key of `HEADS_OF`.
        attention: ``"eager"`` or ``"sdpa"``; the architecture's own default where not given.
        options: changes to the configuration.
    """
    import transformers

    species = name if isinstance(name, Species) else (SPECIES | ENCODER_DECODERS | UNPRUNABLE)[name]
    config = transformers.AutoConfig.for_model(species.model_type, **(species.options | options))
    auto = getattr(transformers, HEADS_OF[head])
    attention = attention or {"gemma2": "eager"}.get(species.model_type)  # older defaults leave its cap out
    extra = {"attn_implementation": attention} if attention else {}
    if hasattr(config, "num_experts_per_tok"):
        extra["experts_implementation"] = "eager"  # the grouped products take no float64
    torch.manual_seed(seed)
    model = auto.from_config(config, **extra).to(dtype).eval()
    return randomize(model, seed)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters anew, in place: matrices that make attention far from uniform, vectors near their value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def batch(
    lengths: list[int],
    *,
    width: int | None = None,
    side: str = "right",
    seed: int = 0,
    low: int = 5,
    high: int = VOCABULARY,
) -> dict[str, Tensor]:
    """Random token rows of these lengths, padded to ``width`` on ``side``: int64 [B, S] ids and attention mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(low, high, (n,), generator=generator) for n in lengths]
    return pad_rows(rows, width=width, side=side)


def pad_rows(rows: list[Tensor], *, width: int | None = None, side: str = "right") -> dict[str, Tensor]:
    """Rows of ids, padded to one width on one side: ``{"input_ids", "attention_mask"}``, int64 [B, S]."""
    width = width or max(len(r) for r in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for b, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        ids[b, start : start + len(row)] = row
        mask[b, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with ``position_ids`` counted over live tokens, as generation code does for left padding."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions}
