"""Exported models under OpenVINO, and how long they take a text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino
from torch import Tensor

from benchmarks.accuracy.features import Features

__all__ = ["Exported", "Way", "milliseconds", "sample", "texts_of"]

Inputs = dict[str, Tensor]


class Exported:
    """A folder that `prunepass.export` wrote, compiled for the CPU; called like the model it came from.

    Args:
        config: the runtime's settings, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", dict(config))
        self._names = [port.get_any_name() for port in self._compiled.inputs]
        self._request = self._compiled.create_infer_request()

    def __call__(self, **inputs: Tensor) -> dict[str, Any]:
        """Named outputs as arrays, of inputs int64 [batch, length]."""
        found = self._request.infer({name: inputs[name].numpy() for name in self._names}, share_inputs=True)
        return {port.get_any_name(): found[port] for port in self._compiled.outputs}

    @property
    def precision(self) -> str:
        """The type the runtime computes in, by its own choice or as asked."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    @property
    def threads(self) -> int:
        """Threads that the runtime computes with."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))


@dataclass(frozen=True)
class Way:
    """A model and the texts it reads.

    Attributes:
        row: "dense", "truncated" or "both".
        budget: share of the dense model's FLOPs.
        texts: of each text its rows, which run one by one; a long text may have several.
        cut: tokens that texts are cut to.
    """

    row: str
    budget: float
    model: Callable[..., Any]
    texts: Sequence[Sequence[Inputs]]
    cut: int | None = None


def milliseconds(
    ways: Sequence[Way], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[Way, float]]:
    """Each way with its milliseconds a text: the mean over the texts of each text's median over the repeats.

    All ways take the same text in turns before the next text comes, and who goes first changes, so that a machine that
    is busy now and then slows all of them alike. A first round, which is not counted, warms up.

    Args:
        clock: gives seconds.
    """
    times: list[list[list[float]]] = [[[] for _ in way.texts] for way in ways]
    for repeat in range(repeats + 1):
        for text in range(len(ways[0].texts)):
            for step in range(len(ways)):
                which = (step + repeat + text) % len(ways)
                started = clock()
                for row in ways[which].texts[text]:
                    ways[which].model(**row)
                if repeat:
                    times[which][text].append(1000 * (clock() - started))
    for way, by_text in zip(ways, times, strict=True):
        yield way, statistics.fmean(statistics.median(found) for found in by_text)


def sample(features: Features, count: int) -> list[int]:
    """Indices of ``count`` examples (all, where there are fewer) that stand for the lengths of all: evenly spaced in
    the order of length."""
    tokens = [0] * len(features.examples)
    for owner, length in zip(features.owners, features.lengths, strict=True):
        tokens[owner] += length
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    count = min(count, len(order))
    return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def texts_of(features: Features, chosen: Sequence[int], tokenizer: Any) -> list[list[Inputs]]:
    """The rows of the chosen examples as inputs of shape [1, length]."""
    rows: dict[int, list[Inputs]] = {example: [] for example in chosen}
    for owner, row in zip(features.owners, features.rows, strict=True):
        if owner in rows:
            one = [{name: row[name] for name in tokenizer.model_input_names}]
            rows[owner].append(dict(tokenizer.pad(one, return_tensors="pt")))
    return [rows[example] for example in chosen]
