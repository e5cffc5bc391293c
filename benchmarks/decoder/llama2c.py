"""Checkpoints and tokenizers of llama2.c (github.com/karpathy/llama2.c, version 0) as transformers' own classes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunepass.errors import DataError

_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


@dataclass(frozen=True)
class Header:
    """The first 28 bytes of a checkpoint, as seven int32. A negative ``vocab`` says that the head has own weights."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def config(self) -> LlamaConfig:
        """The same in transformers' words; what the file leaves out is llama2.c's own."""
        return LlamaConfig(
            vocab_size=abs(self.vocab),
            hidden_size=self.dim,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=self.vocab > 0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )


def read_model(path: Path) -> LlamaForCausalLM:
    """A version-0 checkpoint as a model in float32, in evaluation mode.

    Raises:
        DataError: the file's size does not fit its header.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise DataError(f"{path} has {len(data)} bytes, fewer than the header of a llama2.c checkpoint.")
    header = Header(*_HEADER.unpack_from(data))
    weights = _Weights(path, np.frombuffer(data, "<f4", offset=_HEADER.size))
    model = LlamaForCausalLM(header.config)
    model.load_state_dict(_state(header, weights), strict=not header.config.tie_word_embeddings)
    model.eval()
    return model


class _Weights:
    """Hands out the file's numbers in their order."""

    def __init__(self, path: Path, values: np.ndarray) -> None:
        self._path, self._values, self._at = path, values, 0

    def take(self, *shape: int) -> Tensor:
        end = self._at + int(np.prod(shape))
        if end > len(self._values):
            raise DataError(f"{self._path} ends before its weights do; is it whole, and of version 0?")
        taken = self._values[self._at : end].reshape(shape)
        self._at = end
        return torch.from_numpy(taken.copy())

    def end(self) -> None:
        if self._at != len(self._values):
            raise DataError(f"{self._path} has {len(self._values) - self._at} numbers too many; is it of version 0?")


def _state(h: Header, weights: _Weights) -> dict[str, Tensor]:
    kv = h.kv_heads * h.head_dim
    embedding = weights.take(abs(h.vocab), h.dim)
    parts = {  # one block of the file for each, over all layers
        "input_layernorm": weights.take(h.layers, h.dim),
        "self_attn.q_proj": weights.take(h.layers, h.dim, h.dim),
        "self_attn.k_proj": weights.take(h.layers, kv, h.dim),
        "self_attn.v_proj": weights.take(h.layers, kv, h.dim),
        "self_attn.o_proj": weights.take(h.layers, h.dim, h.dim),
        "post_attention_layernorm": weights.take(h.layers, h.dim),
        "mlp.gate_proj": weights.take(h.layers, h.hidden, h.dim),
        "mlp.down_proj": weights.take(h.layers, h.dim, h.hidden),
        "mlp.up_proj": weights.take(h.layers, h.hidden, h.dim),
    }
    norm = weights.take(h.dim)
    weights.take(2, h.context, h.head_dim // 2)  # cosines and sines, which transformers computes
    head = embedding if h.vocab > 0 else weights.take(-h.vocab, h.dim)
    weights.end()
    parts["self_attn.q_proj"] = _halves(parts["self_attn.q_proj"], h.heads)
    parts["self_attn.k_proj"] = _halves(parts["self_attn.k_proj"], h.kv_heads)
    layers = {f"model.layers.{i}.{name}.weight": part[i] for name, part in parts.items() for i in range(h.layers)}
    return {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": head, **layers}


def _halves(weight: Tensor, heads: int) -> Tensor:
    """[L, heads * d, D] reordered within each head: llama2.c turns pairs (0, 1), (2, 3), ..., transformers (0, d/2),
    (1, d/2 + 1), ..."""
    layers, rows, width = weight.shape
    return weight.view(layers, heads, rows // heads // 2, 2, width).transpose(2, 3).reshape(layers, rows, width)


# -- tokenizer -------------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.bin: byte pairs merged by score, a space before the text, bytes where a character is no piece.

    A row begins with ``<s>`` where special tokens are added by the caller: the tokenizer adds none.

    Raises:
        DataError: the file ends within a piece.
    """
    pieces = list(_pieces(path))
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    made = Tokenizer(BPE(ids, _merges(pieces, ids), unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=UNKNOWN
    )


def _pieces(path: Path) -> Iterator[tuple[str, float]]:
    """(piece, score) by id. The file has line ends around ``<s>`` and ``</s>``."""
    data, at = path.read_bytes(), 4  # after the length of the longest piece
    while at < len(data):
        try:
            score, size = _PIECE.unpack_from(data, at)
            at += _PIECE.size
            (piece,) = struct.unpack_from(f"{size}s", data, at)
        except struct.error:
            raise DataError(f"{path} ends within a piece; is it a tokenizer of llama2.c?") from None
        at += size
        text = piece.decode("utf-8")
        yield (text.strip() if text.strip() in (BEGIN, END) else text), score


def _merges(pieces: list[tuple[str, float]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best score first."""
    ranked = sorted((-score, ids[piece], piece) for piece, score in pieces if len(piece) > 1)
    return [
        (piece[:i], piece[i:])
        for _, _, piece in ranked
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
