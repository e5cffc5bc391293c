"""Vision-language models of transformers: the language model inside, and the tokens that images take the place of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunepass.errors import OptionError

__all__ = ["ID_NAMES", "candidate_ids", "decoder_of_parts", "image_decoder", "language_model_of"]

#: what configurations call the ids that stand where images and videos are put in
ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_PIXELS = ("pixel_values", "pixel_values_videos")


def language_model_of(model: Any) -> nn.Module | None:
    """The language model inside a vision-language model, which takes embeddings and a cache; None where ``model`` is
    none, or has a decoder that attends to its encoder."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "vision_config", None) is None or getattr(config, "is_encoder_decoder", False):
        return None
    for holder in (model, getattr(model, "model", None)):
        for name in ("language_model", "text_model"):
            found = getattr(holder, name, None)
            if isinstance(found, nn.Module) and "past_key_values" in inspect.signature(found.forward).parameters:
                return found
    return None


def candidate_ids(config: Any) -> tuple[int, ...]:
    """The image and video tokens that a configuration names."""
    found = [getattr(config, name, None) for name in ID_NAMES]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def image_decoder(model: Any, inputs: Any) -> nn.Module | None:
    """`language_model_of`, where inputs hold images or videos by name; None for a call of text alone."""
    named = isinstance(inputs, Mapping) and any(inputs.get(name) is not None for name in _PIXELS)
    return language_model_of(model) if named else None


def decoder_of_parts(model: Any, inputs: Any) -> nn.Module:
    """`image_decoder`, of a model whose parts have a plan each.

    Raises:
        OptionError: there are no images among the inputs.
    """
    if (decoder := image_decoder(model, inputs)) is None:
        raise OptionError(
            "Plans for several parts of a vision-language model are read with images. Give the keyword arguments of "
            "a real call as example_inputs, with input_ids and pixel_values."
        )
    return decoder
