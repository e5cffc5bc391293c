"""Tiny models of any causal type: its own default configuration, with sizes made small by their names."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import zoo

#: layers of every model; those that transformers keeps for a last, different part come on top
LAYERS = zoo.LAYERS
MAX_PARAMETERS = 40_000_000


def _named(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, Any] = {
    **_named("hidden_size d_model n_embd dim emb_dim embed_dim word_embed_proj_dim embedding_size", zoo.HIDDEN),
    **_named("attention_hidden_size text_embed_dim", zoo.HIDDEN),
    **_named("num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads", zoo.HEADS),
    **_named("num_encoder_attention_heads num_decoder_attention_heads", zoo.HEADS),
    **_named("num_key_value_heads swa_num_key_value_heads num_kv_heads", 2),
    **_named("head_dim d_kv attention_head_size d_head kv_channels global_head_dim swa_head_dim", zoo.HEAD_SIZE),
    **_named("qk_nope_head_dim v_head_dim swa_v_head_dim", zoo.HEAD_SIZE),
    **_named("intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner dff ffn_hidden_size", 40),
    **_named("hidden_dim d_inner intermediate_size_mlp ffn_hidden_size mlp_hidden_size", 40),
    **_named("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", LAYERS),
    **_named("num_decoder_layers num_encoder_layers", LAYERS),
    **_named("vocab_size n_words vocab_size_per_layer_input", zoo.VOCABULARY),
    **_named("max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length", zoo.POSITIONS),
    **_named("num_experts num_local_experts n_routed_experts moe_num_experts num_local_experts", 4),
    **_named("num_experts_per_tok moe_k moe_topk moe_num_active_experts", 2),
    **_named("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
    **_named("n_group topk_group n_shared_experts first_k_dense_replace moe_num_shared_experts zero_expert_num", 1),
    "rotary_dim": 4,
    "qk_rope_head_dim": zoo.HEAD_SIZE,
    **_named("q_lora_rank kv_lora_rank intra_bottleneck_size true_hidden_size", 16),
    **_named("sliding_window attention_window local_attention window_size attention_chunk_size", 5),
    **_named("layerdrop encoder_layerdrop decoder_layerdrop", 0.0),
    **_named("hidden_size_per_layer_input laurel_rank", 8),
    "global_attn_every_n_layers": 2,
    "query_pre_attn_scalar": 8,
    "type_vocab_size": 2,
    "use_cache": False,
    "use_mambapy": False,
    "pad_token_id": zoo.PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "mask_token_id": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "state_size": 4,
    "ssm_state_size": 4,
    "num_kv_shared_layers": 2,
    "is_decoder": True,
}
#: where the names' common values do not go together
_OWN: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * LAYERS},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "xlstm": {"num_heads": 4},
    "phi4_multimodal": {"num_hidden_layers": LAYERS},
}
#: tried without these one after the other, where a configuration is refused
_DROPS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "",
        "head_dim",
        "num_key_value_heads",
        "layer_types",
        "sliding_window",
        "is_decoder",
        "q_lora_rank",
        "num_kv_shared_layers",
        "head_dim num_key_value_heads layer_types",
    )
)


class NotBuiltError(Exception):
    """No small model of a type could be made."""


def causal_types() -> list[str]:
    """The model types that transformers offers a causal head for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, **options: Any) -> Any:
    """A tiny random causal model in float64 and eval mode.

    Args:
        options: changes to the configuration.

    Raises:
        NotBuiltError: with transformers' own reason, or because it is large whatever its sizes.
    """
    cls = transformers.CONFIG_MAPPING[model_type]
    error: Exception | None = None
    for drop in _DROPS:
        try:
            return _built(cls, model_type, drop, options)
        except Exception as e:  # every configuration raises what it likes
            error = error or e
    assert error is not None
    raise NotBuiltError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _built(cls: Any, model_type: str, drop: frozenset[str], options: dict[str, Any]) -> nn.Module:
    base = cls()
    small = {k: v for k, v in _small(base).items() if k not in drop}
    config = cls(**{**small, **_OWN.get(model_type, {}), **options})
    if hasattr(config, "eos_token_id") and options.get("use_cache"):
        config.eos_token_id = None
    if options.get("use_cache"):  # the text model of a composite reads its own
        config.get_text_config().use_cache = True
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise NotBuiltError(f"{size} parameters")
    torch.manual_seed(0)
    extra = {"experts_implementation": "eager"}  # transformers' grouped products take no float64
    model = transformers.AutoModelForCausalLM.from_config(config, **extra).double().eval()
    zoo.randomize(model)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 19).reshape(2, 7))  # sizes that do not go together raise here
    return model


def _small(config: Any) -> dict[str, Any]:
    """Arguments that make a configuration small."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            found[name] = type(value)(**_small(value))
        elif name in _SIZES and (value is not None or name in ("use_cache", "pad_token_id")):
            found[name] = _SIZES[name]
        elif ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            found[name] = 0.0
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds * LAYERS)[:LAYERS]
    for name, value in _SIZES.items():
        if name not in found and getattr(config, name, None) is not None:
            found[name] = value
    mapped = getattr(type(config), "attribute_map", {})
    return {name: value for name, value in found.items() if mapped.get(name) not in found}
