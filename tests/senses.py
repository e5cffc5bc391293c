"""Tiny random models that see or hear, beside the text models of `zoo`: seeded, float64, no dropout.

The image is 24 by 24 pixels, in patches of 4: 36 patches. A sound has 400 samples, of which the model makes 39 frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import zoo

LAYERS = zoo.LAYERS
SAMPLES, MELS = 400, 16

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SOUND: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "conv_dim": [16, 12],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
_STABLE = _SOUND | {"do_stable_layer_norm": True}
_WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "num_mel_bins": MELS,
    "max_source_positions": 30,
    "vocab_size": 97,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Sense:
    """One architecture.

    Attributes:
        model_type, options: of its configuration.
        prefix: class, register and distillation tokens at the start of each row.
        tokens: of a row, those included.
        head: which class of transformers.
        input: the name of its input.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    prefix: int = 1
    tokens: int = 37
    head: str = "AutoModel"
    input: str = "pixel_values"


IMAGES: dict[str, Sense] = {
    "vit": Sense("vit", _VISION),
    "deit": Sense("deit", _VISION, prefix=2, tokens=38),
    "beit": Sense("beit", _VISION | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5}),
    "data2vec-vision": Sense(
        "data2vec-vision", _VISION | {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.5}
    ),
    "dinov2": Sense("dinov2", _VISION | {"image_size": 40}),
    "dinov2-registers": Sense("dinov2_with_registers", _VISION | {"num_register_tokens": 4}, prefix=5, tokens=41),
    "dinov3": Sense("dinov3_vit", _VISION | {"num_register_tokens": 3}, prefix=4, tokens=40),
    "clip": Sense("clip_vision_model", _VISION),
    "siglip": Sense("siglip_vision_model", _VISION, prefix=0, tokens=36),
    "vit-mae": Sense("vit_mae", _VISION | {"mask_ratio": 0.0}),
    "vit-msn": Sense("vit_msn", _VISION),
    "ijepa": Sense("ijepa", _VISION, prefix=0, tokens=36),
    "vit-classifier": Sense("vit", _VISION | {"num_labels": 5}, head="AutoModelForImageClassification"),
    "dinov2-classifier": Sense("dinov2", _VISION | {"num_labels": 5}, head="AutoModelForImageClassification"),
    "beit-classifier": Sense(
        "beit",
        _VISION | {"use_absolute_position_embeddings": True, "num_labels": 5},
        head="AutoModelForImageClassification",
    ),
}
SOUNDS: dict[str, Sense] = {
    "wav2vec2": Sense("wav2vec2", _STABLE, prefix=0, tokens=39, input="input_values"),
    "wav2vec2-ctc": Sense(
        "wav2vec2", _STABLE | {"vocab_size": 11}, prefix=0, tokens=39, head="AutoModelForCTC", input="input_values"
    ),
    "wav2vec2-classifier": Sense(
        "wav2vec2", _SOUND, prefix=0, tokens=39, head="AutoModelForAudioClassification", input="input_values"
    ),
    "hubert": Sense("hubert", _STABLE, prefix=0, tokens=39, input="input_values"),
    "wavlm": Sense("wavlm", _STABLE, prefix=0, tokens=39, input="input_values"),
    "unispeech-sat": Sense("unispeech-sat", _STABLE, prefix=0, tokens=39, input="input_values"),
    "data2vec-audio": Sense(
        "data2vec-audio", _SOUND | {"num_conv_pos_embeddings": 2}, prefix=0, tokens=39, input="input_values"
    ),
    "ast": Sense(
        "audio-spectrogram-transformer",
        _VISION | {"frequency_stride": 4, "time_stride": 4, "max_length": 32, "num_mel_bins": MELS},
        prefix=2,
        tokens=34,
        input="input_values",
    ),
    "whisper-classifier": Sense(
        "whisper", _WHISPER, prefix=0, tokens=30, head="AutoModelForAudioClassification", input="input_features"
    ),
}
SENSES = IMAGES | SOUNDS


@cache
def tiny(name: str, dtype: Any = torch.float64) -> nn.Module:
    """A tiny random model in eval mode; shared, so not to be changed."""
    import transformers

    sense = SENSES[name]
    config = transformers.AutoConfig.for_model(sense.model_type, **sense.options)
    torch.manual_seed(0)
    model = getattr(transformers, sense.head).from_config(config).to(dtype).eval()
    return zoo.randomize(model, 0)


def example(
    name: str, rows: int = 2, seed: int = 0, padded: bool = True, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    """Random inputs; sounds that a mask goes with end at different samples."""
    sense = SENSES[name]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)

    if sense.input == "pixel_values":
        more = {"noise": torch.rand(rows, 36, generator=generator)} if name == "vit-mae" else {}
        return {"pixel_values": noise(3, 24, 24), **more}
    if sense.input == "input_features":
        return {"input_features": noise(MELS, 60)}
    if name == "ast":
        return {"input_values": noise(32, MELS)}
    mask = torch.ones(rows, SAMPLES, dtype=torch.int64)
    for row in range(1, rows if padded else 0):
        mask[row, 250 - 40 * row :] = 0
    return {"input_values": noise(SAMPLES) * mask, "attention_mask": mask}


def live(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T] bool: which tokens the model makes of live samples."""
    given = inputs[SENSES[name].input]
    if "attention_mask" not in inputs:
        return torch.ones(len(given), SENSES[name].tokens, dtype=torch.bool)
    places = torch.arange(_frames(given.shape[1])).expand(len(given), -1)
    return places < _frames(inputs["attention_mask"].sum(1))[:, None]


def _frames(samples: Any) -> Any:
    """By the kernels and strides of `_SOUND`."""
    return ((samples - 10) // 5 + 1 - 3) // 2 + 1
