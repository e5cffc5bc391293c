"""llama2.c's files read into transformers' classes, against its own arithmetic written down once more."""

from __future__ import annotations

import random
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import torch

from benchmarks.decoder.llama2c import read_model, read_tokenizer
from prunepass.errors import DataError

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 24, 20, 2, 6, 3, 31, 16
WIDTH = DIM // HEADS
SHAPES = {
    "embedding": (VOCAB, DIM),
    "attention_norm": (LAYERS, DIM),
    "wq": (LAYERS, DIM, DIM),
    "wk": (LAYERS, KV_HEADS * WIDTH, DIM),
    "wv": (LAYERS, KV_HEADS * WIDTH, DIM),
    "wo": (LAYERS, DIM, DIM),
    "ffn_norm": (LAYERS, DIM),
    "w1": (LAYERS, HIDDEN, DIM),
    "w2": (LAYERS, DIM, HIDDEN),
    "w3": (LAYERS, HIDDEN, DIM),
    "norm": (DIM,),
    "rotations": (2, CONTEXT, WIDTH // 2),
}


def checkpoint(path: Path, shared: bool = True) -> dict[str, Any]:
    """A checkpoint of random weights; its arrays, in float64."""
    rng = np.random.default_rng(0)
    shapes = SHAPES if shared else {**SHAPES, "head": (VOCAB, DIM)}
    arrays = {name: rng.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB if shared else -VOCAB, CONTEXT)
    path.write_bytes(header + b"".join(a.tobytes() for a in arrays.values()))
    return {name: a.astype(np.float64) for name, a in arrays.items()}


def rotated(x: Any) -> Any:
    """[S, heads, d]: the pairs (0, 1), (2, 3), ... of each head turned by position, as run.c does."""
    length, _, width = x.shape
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def normed(x: Any, weight: Any) -> Any:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def logits(w: dict[str, Any], ids: list[int]) -> Any:
    """[S, V] by llama2.c's forward pass."""
    x, length = w["embedding"][ids], len(ids)
    for i in range(LAYERS):
        h = normed(x, w["attention_norm"][i])
        q, k, v = (
            (h @ w[name][i].T).reshape(length, heads, WIDTH)
            for name, heads in (("wq", HEADS), ("wk", KV_HEADS), ("wv", KV_HEADS))
        )
        k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", rotated(q), k) / np.sqrt(WIDTH)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        x = x + attended.reshape(length, DIM) @ w["wo"][i].T
        h = normed(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return normed(x, w["norm"]) @ w.get("head", w["embedding"]).T


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "own head"])
def test_logits_are_llama2cs(tmp_path: Path, shared: bool) -> None:
    file = tmp_path / "model.bin"
    weights = checkpoint(file, shared)
    ids = [1, 5, 30, 5, 17, 2, 9, 9, 28, 11]
    with torch.no_grad():
        found = read_model(file).double()(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - logits(weights, ids)).max() < 1e-5  # transformers' table of rotations is float32
    assert np.abs(found).max() > 0.1


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    checkpoint(file)
    whole = file.read_bytes()
    for content, message in ((whole[:-8], "ends before"), (whole + b"\0" * 8, "2 numbers too many"), (b"", "header")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_model(file)


# -- tokenizer -------------------------------------------------------------------------------------------------------

PIECES = [" ", *"abdehlor", "he", "ll", " he", "llo", " a", "ab", "abba", "bb", "ba", "or", "lo", "hello", " hello"]


def tokenizer_file(path: Path) -> list[tuple[bytes, float]]:
    """A tokenizer.bin with scores in no order."""
    scores = random.Random(4).sample(range(100), len(PIECES))
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(p.encode(), -float(s)) for p, s in zip(PIECES, scores, strict=True)]
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    path.write_bytes(struct.pack("<i", 8) + body)
    return pieces


def encoded(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """run.c's encode: characters, or their bytes; then the two neighbours of the best score, again and again."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        merged = [ids.get(pieces[a][0] + pieces[b][0]) for a, b in pairwise(tokens)]
        possible = [(pieces[m][1], -i) for i, m in enumerate(merged) if m is not None]
        if not possible:
            return tokens
        at = -max(possible)[1]
        found = merged[at]
        assert found is not None
        tokens[at : at + 2] = [found]


def test_ids_are_llama2cs(tmp_path: Path) -> None:
    pieces = tokenizer_file(tmp_path / "tok.bin")
    tokenizer = read_tokenizer(tmp_path / "tok.bin")
    rng = random.Random(0)
    texts = ["hello", "abba hello", "zebra\n\té", *("".join(rng.choices("abdehlor ", k=12)) for _ in range(200))]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == encoded(pieces, text), text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_half_a_piece_is_refused(tmp_path: Path) -> None:
    tokenizer_file(tmp_path / "tok.bin")
    (tmp_path / "tok.bin").write_bytes((tmp_path / "tok.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match="within a piece"):
        read_tokenizer(tmp_path / "tok.bin")
