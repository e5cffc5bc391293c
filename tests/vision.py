"""Tiny random vision-language models: seeded, float64, no dropout. Each reads prompts with images in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import zoo

IMAGE, VIDEO, START, END = 90, 91, 92, 93
LAYERS = 4
#: images of one batch; the first ones are the same in each
MOST = 8
_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_IDS = _IDS | {"vision_start_token_id": START, "vision_end_token_id": END}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Seer:
    """One type of vision-language model.

    Attributes:
        model_type, options: of its configuration.
        tokens: of one image.
        pixels: what the model gets for a number of images.
        types: whether it gets token_type_ids, 1 at an image's tokens.
        text: options of the language model that differ.
    """

    model_type: str
    options: dict[str, Any]
    tokens: int
    pixels: Callable[[int], dict[str, Tensor]]
    types: str = ""
    text: dict[str, Any] = field(default_factory=dict)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _images(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"pixel_values": _noise(MOST, 3, size, size)[:n]}


def _tiles(n: int) -> dict[str, Tensor]:
    """One tile of the whole image, and one part of it."""
    return {"pixel_values": _noise(MOST, 2, 3, 16, 16)[:n], "image_sizes": torch.tensor([[16, 16]] * n)}


def _stacked(n: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(1, MOST, 3, 16, 16)[:, :n]}


def _grid(channels: int) -> Callable[[int], dict[str, Tensor]]:
    """8 by 8 patches an image, of which four make a token."""
    return lambda n: {
        "pixel_values": _noise(64 * MOST, channels)[: 64 * n],
        "image_grid_thw": torch.tensor([[1, 8, 8]] * n),
    }


def _sized(n: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(MOST, 3, 16, 16)[:n], "image_sizes": torch.tensor([[16, 16]] * n)}


SEERS: dict[str, Seer] = {
    "llava": Seer(
        "llava",
        {
            "vision_config": {"model_type": "clip_vision_model", **_CLIP},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        16,
        _images(16),
        text={"model_type": "llama"},
    ),
    "llava_next": Seer(
        "llava_next",
        {
            "vision_config": {"model_type": "clip_vision_model", **_CLIP},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": [[16, 16]],
        },
        36,
        _tiles,
        text={"model_type": "llama"},
    ),
    "qwen2_vl": Seer(
        "qwen2_vl",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            **_QWEN_IDS,
        },
        16,
        _grid(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text={"rope_parameters": _ROPE},
    ),
    "qwen2_5_vl": Seer(
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_IDS,
        },
        16,
        _grid(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text={"rope_parameters": _ROPE},
    ),
    "qwen3_vl": Seer(
        "qwen3_vl",
        {
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN_IDS,
        },
        16,
        _grid(3 * 2 * 4 * 4),
        types="mm_token_type_ids",
        text={"rope_parameters": _ROPE},
    ),
    "gemma3": Seer(
        "gemma3",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_CLIP},
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        16,
        _images(16),
        types="token_type_ids",
        text={
            "query_pre_attn_scalar": 8,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "paligemma": Seer(
        "paligemma",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_CLIP, "projection_dim": 32},
            "image_token_index": IMAGE,
            "projection_dim": 32,
        },
        16,
        _images(16),
        types="token_type_ids",
        text={"model_type": "gemma"},
    ),
    "internvl": Seer(
        "internvl",
        {
            "vision_config": {**_CLIP, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        4,
        _images(16),
        text={"model_type": "qwen2"},
    ),
    "aya_vision": Seer(
        "aya_vision",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_CLIP},
            "image_token_index": IMAGE,
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-5,
        },
        4,
        _images(16),
        text={"model_type": "cohere2", "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "idefics3": Seer(
        "idefics3",
        {"vision_config": _CLIP, "image_token_id": IMAGE, "scale_factor": 2},
        4,
        _stacked,
        text={"model_type": "llama"},
    ),
    "smolvlm": Seer(
        "smolvlm",
        {"vision_config": _CLIP, "image_token_id": IMAGE, "scale_factor": 2},
        4,
        _stacked,
        text={"model_type": "llama"},
    ),
    "mistral3": Seer(
        "mistral3",
        {
            "vision_config": {"model_type": "pixtral", **_CLIP},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        4,
        _sized,
        text={"model_type": "mistral", "sliding_window": None},
    ),
}


def tiny(name: str, dtype: Any = torch.float64, **text: Any) -> nn.Module:
    """A tiny random model in eval mode."""
    import transformers

    seer = SEERS[name]
    options = {**seer.options, "text_config": {**_TEXT, **seer.text, **text}}
    config = transformers.AutoConfig.for_model(seer.model_type, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).to(dtype).eval()
    return zoo.randomize(model, 0)


def prompt(name: str, rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """A batch of prompts.

    Args:
        rows: of each row, how many tokens of text stand before an image, ..., and after the last one.
    """
    seer = SEERS[name]
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in rows:
        ids: list[int] = []
        for i, count in enumerate(row):
            if i:
                ids += [START, *[IMAGE] * seer.tokens, END]
            ids += torch.randint(5, 60, (count,), generator=generator).tolist()
        made.append(ids)
    length = max(map(len, made))
    gaps = [[0] * (length - len(ids)) for ids in made]
    ids = torch.tensor([gap + ids if side == "left" else ids + gap for gap, ids in zip(gaps, made, strict=True)])
    mask = (ids != 0).long()
    images = sum(len(row) - 1 for row in rows)
    given = {"input_ids": ids, "attention_mask": mask}
    if seer.types:  # PaliGemma's mark what follows the prompt
        given[seer.types] = (ids == IMAGE).long() * (name != "paligemma")
    return {**given, **(seer.pixels(images) if images else {})}
