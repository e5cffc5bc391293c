"""Semantic search in ways to be compared: the corpus, the embedding through OpenVINO, speed in turns, and quality."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino

import prunepass
from prunepass.cli.texts import docstrings
from prunepass.cost import FlopCounter, corpus_flops
from prunepass.export.hub import Loaded
from prunepass.graph.capture import capture_module

Vectors = np.ndarray[Any, np.dtype[np.float32]]

BATCH = 8
TURNS = 8
MAX_LENGTH = 512

QUERIES = (
    "solve a sparse linear system of equations",
    "fit a smooth curve through noisy data points",
    "singular value decomposition of a matrix",
    "find the minimum of a function with constraints",
    "fast Fourier transform of a real signal",
    "learning rate schedule with warm restarts",
    "convolution of an image with a kernel",
    "cross entropy loss for classification",
    "test whether two samples have the same mean",
    "shortest path in a graph",
    "draw random numbers from a normal distribution",
    "integrate a system of ordinary differential equations",
    "save a model and load it again",
    "hierarchical clustering dendrogram",
    "design a low pass digital filter",
    "nearest neighbour search in many dimensions",
    "recurrent neural network layer",
    "read a matlab file",
    "rotation of vectors in three dimensions",
    "sort an array along an axis",
    "attention with queries, keys and values",
    "interpolate values on a regular grid",
    "measure how long each operator takes",
    "correlation between two variables",
)


@dataclass(frozen=True)
class Corpus:
    """Long documents, as the model sees them.

    Attributes:
        rows: token ids of each document, cut to what the model takes.
        seen: number of characters of each text that the model sees.
    """

    names: list[str]
    texts: list[str]
    rows: list[list[int]]
    seen: list[int]

    @classmethod
    def read(cls, loaded: Loaded, documents: int) -> Corpus:
        """A fixed sample of the long docstrings of numpy, scipy and torch."""
        found = docstrings(minimum_characters=1500)
        names = random.Random(0).sample(sorted(found), min(documents, len(found)))
        texts = [found[name] for name in names]
        encoded = loaded.tokenizer(texts, truncation=True, max_length=MAX_LENGTH, return_offsets_mapping=True)
        return cls(names, texts, encoded["input_ids"], [offsets[-2][1] for offsets in encoded["offset_mapping"]])

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def cut(self, length: int) -> list[list[int]]:
        """The rows cut to ``length`` tokens, each with its closing token."""
        return [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in self.rows]


class Embedder:
    """Mean pooling and normalising on top of an exported encoder, as sentence-transformers does it."""

    def __init__(self, folder: Path, pad: int, config: dict[str, str]) -> None:
        self.compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
        self.inputs = {port.get_any_name() for port in self.compiled.inputs}
        self.pad = pad

    def __call__(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Unit vectors [len(rows), width] of rows of token ids."""
        ids = np.full((len(rows), max(map(len, rows))), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self.compiled({name: values[name] for name in self.inputs})["last_hidden_state"]
        # Pruned positions are zeros in the pruned model's output, so the sum is the sum over the tokens kept.
        pooled = (hidden * mask[:, :, None]).sum(1)
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), dtype=np.float32)

    @property
    def precision(self) -> str:
        """The type the runtime computes in, by its own choice or as asked."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


@dataclass(frozen=True)
class Way:
    """One way of embedding the corpus: a model, the rows it gets, and dense FLOPs over its own."""

    embedder: Embedder
    rows: list[list[int]]
    flops_ratio: float


@dataclass(frozen=True)
class Outcome:
    """What one way of embedding gave.

    Attributes:
        documents_per_second: median over the turns.
        overlap_at_10: share of the ten best documents that dense puts there too, averaged over the queries.
        kendall_tau: rank correlation with the dense ranking of all documents, averaged over the queries.
        found: share of sampled documents that are among the ten best for a sentence taken from them.
    """

    documents_per_second: float
    flops_ratio: float
    overlap_at_10: float
    kendall_tau: float
    found: float


def export(
    loaded: Loaded, plan: prunepass.PrunePlan, folder: Path, config: dict[str, str], *, model: Any = None
) -> Embedder:
    """The pruned model as an OpenVINO folder, in the place of an earlier one, and compiled.

    Args:
        model: the model already pruned by ``plan``, where the caller has it.
    """
    if (folder / "openvino_model.xml").is_file():
        for file in folder.iterdir():
            file.unlink()
    prunepass.export(model or loaded.model, plan, folder, to="openvino", tokenizer=loaded.tokenizer)
    return Embedder(folder, loaded.tokenizer.pad_token_id, config)


def compare(
    ways: dict[str, Way], corpus: Corpus, loaded: Loaded, progress: Callable[[range], Any] = iter
) -> tuple[dict[str, Outcome], dict[str, Vectors]]:
    """Embed the corpus in each way and hold it against the way called "dense".

    Returns:
        outcomes by way, and by way the scores [queries, documents] of `QUERIES`.
    """
    vectors, speeds = embed_in_turns(ways, progress)
    rng = random.Random(0)
    asked = rng.sample(range(len(corpus.names)), min(400, len(corpus.names)))
    sentences = [sentence_of(corpus.texts[i], corpus.seen[i], rng) for i in asked]
    queries, probes = (embed_texts(ways["dense"].embedder, loaded, texts) for texts in (QUERIES, sentences))
    scores = {name: queries @ v.T for name, v in vectors.items()}
    outcomes = {
        name: Outcome(
            speeds[name],
            ways[name].flops_ratio,
            overlap_at_10(scores["dense"], scores[name]),
            kendall_tau(scores["dense"], scores[name]),
            found_in_10(probes @ vectors[name].T, asked),
        )
        for name in ways
    }
    return outcomes, scores


def embed_in_turns(
    ways: dict[str, Way], progress: Callable[[range], Any]
) -> tuple[dict[str, Vectors], dict[str, float]]:
    """Embed every row in each of the ways, and the median rows a second of each.

    The rows are sorted by length and dealt out to the turns, so that each turn has the same mix; within a turn the
    ways run one after the other, starting with another one each time, so that they share whatever else the machine
    is doing.
    """
    lengths = [len(row) for row in ways["dense"].rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    vectors: dict[str, list[Any]] = {name: [None] * len(order) for name in ways}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in progress(range(TURNS)):
        part = order[turn::TURNS]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            way = ways[name]
            way.embedder([way.rows[i] for i in part[-BATCH:]])  # warm up
            start = time.perf_counter()
            for at in range(0, len(part), BATCH):
                batch = part[at : at + BATCH]
                for i, vector in zip(batch, way.embedder([way.rows[i] for i in batch]), strict=True):
                    vectors[name][i] = vector
            speeds[name].append(len(part) / (time.perf_counter() - start))
    return {n: np.stack(v) for n, v in vectors.items()}, {n: statistics.median(s) for n, s in speeds.items()}


def embed_texts(embedder: Embedder, loaded: Loaded, texts: Sequence[str]) -> Vectors:
    """Unit vectors [len(texts), width]."""
    rows = loaded.tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return np.concatenate([embedder(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)])


# -- cost ------------------------------------------------------------------------------------------------------------


class CutToBudget:
    """Finds the length that texts must be cut to so that the dense model costs no more than a budget of FLOPs."""

    def __init__(self, loaded: Loaded, corpus: Corpus) -> None:
        inputs = loaded.encode(corpus.texts[:2])
        self.counter = FlopCounter(capture_module(loaded.model, inputs).graph_module)
        self.lengths = corpus.lengths

    def flops(self, cut: int) -> int:
        """FLOPs of the corpus cut to ``cut`` tokens, counted on real tokens (no padding)."""
        return corpus_flops(self.counter, [min(n, cut) for n in self.lengths]).real_tokens

    def __call__(self, ratio: float) -> int:
        """The longest cut that costs at most 1 / ``ratio`` of the uncut corpus."""
        budget = self.flops(MAX_LENGTH) / ratio
        low, high = 2, MAX_LENGTH
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.flops(middle) <= budget else (low, middle - 1)
        return low


# -- quality ---------------------------------------------------------------------------------------------------------


def sentence_of(text: str, end: int, rng: random.Random) -> str:
    """A sentence from anywhere in the first ``end`` characters of ``text``."""
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.:])\s+|\n\n", text[:end])]
    return rng.choice([s for s in sentences if 40 <= len(s) <= 250 and s.count(" ") >= 5] or [text[:200]])


def overlap_at_10(dense: Vectors, other: Vectors) -> float:
    """Mean share of the ten best columns of each row that both have."""
    best = [np.argsort(-scores, axis=1)[:, :10] for scores in (dense, other)]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*best, strict=True)]))


def kendall_tau(dense: Vectors, other: Vectors) -> float:
    """Mean rank correlation of the rows."""
    from scipy.stats import kendalltau

    return float(np.mean([kendalltau(a, b).statistic for a, b in zip(dense, other, strict=True)]))


def found_in_10(scores: Vectors, answers: Sequence[int]) -> float:
    """Share of the rows whose answer is among the ten best columns."""
    own = scores[np.arange(len(answers)), answers]
    return float(np.mean((scores > own[:, None]).sum(axis=1) < 10))
