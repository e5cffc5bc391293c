"""Speed of a decoder of a well-known shape, dense and under SDTP's schedule: first token, decoding, memory.

Random weights and random tokens do for time. Both models come to their runtime by the same backend (the dense one by a
plan without stages) and are called in turns through ``generate()``, as users call them; predictors are as wide as the
model, as in the paper, and their time is inside.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.decoder.memory import watch_peak
from benchmarks.latency.cells import runtime_state
from benchmarks.latency.conditions import conditions
from benchmarks.latency.targets import Target, compiled
from benchmarks.latency.turns import quartiles, summary
from benchmarks.records import write
from prunepass import PrunePlan
from prunepass.cost import FlopCounter
from prunepass.dynamo.backend import compilations
from prunepass.errors import OptionError
from prunepass.generation.attention import install
from prunepass.scorers.mlp import predictor_shapes

__all__ = ["SHAPES", "Speed", "measure_speed", "run_speed"]

log = logging.getLogger(__name__)

_LLAMA: dict[str, Any] = {"max_position_embeddings": 32_768, "eos_token_id": None}
SHAPES: dict[str, Callable[[], Any]] = {
    "llama-1b": partial(
        transformers.LlamaConfig,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        **_LLAMA,
    ),
    "llama-7b": partial(transformers.LlamaConfig, **_LLAMA),
}
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Speed:
    """What is timed.

    Attributes:
        model: a key of `SHAPES`.
        target: of torch.compile.
        dtype: of weights and computing.
        device: "cpu" or "cuda".
        new: tokens that are generated; the first of them ends the prefill.
        repeats: calls of each way that count.
        threads: PyTorch's.
    """

    model: str = "llama-1b"
    target: str = "eager"
    dtype: str = "bfloat16"
    device: str = "cpu"
    new: int = 17
    repeats: int = 3
    threads: int = 1

    @property
    def place(self) -> Target:
        """As the latency benchmark names it."""
        precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[self.dtype]
        return Target(self.target, precision, compiled(self.target), self.device, getattr(torch, self.dtype))


class _Times(transformers.StoppingCriteria):
    """Seconds at which each token was there; ends nothing."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._device != "cpu":
            torch.accelerator.synchronize()
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class _Way:
    """A compiled model, and what its calls took."""

    model: Any
    device: str
    first: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    graph: torch.fx.GraphModule | None = None
    cache: float = 0.0
    peak: float | None = None

    def call(self, ids: Tensor, new: int) -> None:
        """Generate ``new`` tokens; adds a figure to ``first`` (milliseconds) and ``rate`` (tokens a second)."""
        times = _Times(self.device)
        began = time.perf_counter()
        done = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=[times],
            return_dict_in_generate=True,
        )
        self.first.append(1000 * (times.at[0] - began))
        self.rate.append((new - 1) / (times.at[-1] - times.at[0]))
        layers = done.past_key_values.layers
        self.cache = sum(t.numel() * t.element_size() for x in layers for t in (x.keys, x.values)) / _MEBIBYTE

    def flops(self, length: int) -> int:
        """Of the prefill, counted on the graph that ran."""
        assert self.graph is not None
        return FlopCounter(self.graph, batch=1, length=length).total(1, length)

    def warm_up(self, ids: Tensor, new: int) -> None:
        """A call that may compile, and one whose memory is watched, which takes time; forgets all times so far."""
        known = len(compilations())
        self.call(ids, new)
        if self.graph is None:
            result = compilations()[known].result  # of the prompt; later graphs go on from its cache
            assert result is not None
            self.graph = result.graph_module
        with watch_peak(self.device) as peak:
            self.call(ids, new)
        self.peak = peak.mebibytes
        self.first.clear()
        self.rate.clear()


def run_speed(speed: Speed, lengths: tuple[int, ...], folder: Path) -> Path:
    """Measure, and write ``speed.<model>.<target>.<precision>.<device>.json``; gives its path."""
    if reason := speed.place.why_not():
        raise OptionError(f"The device {speed.device} cannot be measured here: {reason}.")
    target = speed.place
    record: dict[str, Any] = {**asdict(speed), **conditions(target, speed.threads), "speed": []}
    path = folder / f"speed.{speed.model}.{target.runtime}-{target.precision}.{speed.device}.json"
    for found in measure_speed(speed, lengths):
        log.info("%s", found)
        record["speed"].append(found)
        write(path, record)
    return path


def measure_speed(speed: Speed, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A record for each length.

    Raises:
        OptionError: there is no such shape.
    """
    if speed.model not in SHAPES:
        raise OptionError(f"There is no shape {speed.model!r}; there are {', '.join(SHAPES)}.")
    with runtime_state(speed.threads):
        ways = _ways(speed)
        for length in lengths:
            ids = torch.randint(0, ways["dense"].model.config.vocab_size, (1, length), device=speed.device)
            for way in ways.values():
                way.warm_up(ids, speed.new)
            for repeat in range(speed.repeats):
                for way in list(ways.values())[:: -1 if repeat % 2 else 1]:
                    way.call(ids, speed.new)
            yield _figures(length, ways)


def _ways(speed: Speed) -> dict[str, _Way]:
    torch.manual_seed(0)
    config = SHAPES[speed.model]()
    with torch.device(speed.device):
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=speed.place.dtype).eval()
        plan = _with_predictors(PrunePlan.sdtp(config.num_hidden_layers), config.hidden_size)
    install()  # not by the first call that prunes: it would have all that was traced before traced again
    ways = {}
    for name, one in (("dense", PrunePlan(())), ("pruned", plan)):
        # the weights are shared; what torch.compile keeps on a module is not
        model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
        model.compile(backend="tokprune", options={"plan": one, "target": speed.target}, dynamic=True)
        ways[name] = _Way(model, speed.device)
    return ways


def _with_predictors(plan: PrunePlan, width: int) -> PrunePlan:
    """Random ones, as wide as the model."""
    shapes = predictor_shapes(width, width)
    weights = {f"stages.{i}.{n}": 0.02 * torch.randn(s) for i in range(len(plan.stages)) for n, s in shapes.items()}
    return replace(plan, weights=weights)


def _figures(length: int, ways: dict[str, _Way]) -> dict[str, Any]:
    dense, pruned = ways["dense"], ways["pruned"]
    flops = {name: way.flops(length) for name, way in ways.items()}
    ratio = flops["dense"] / flops["pruned"]
    ratios = [d / p for d, p in zip(dense.first, pruned.first, strict=True)]
    speedup = summary(dense.first)["p50"] / summary(pruned.first)["p50"]
    return {
        "length": length,
        "flops": flops,
        "flops_ratio": round(ratio, 4),
        "first_token_ms": {name: summary(way.first) for name, way in ways.items()},
        "speedup": round(speedup, 4),
        "speedup_quartiles": [round(q, 4) for q in quartiles(ratios)],
        "share_of_flops_ratio": round(speedup / ratio, 4),
        "tokens_per_second": {name: summary(way.rate)["p50"] for name, way in ways.items()},
        "cache_mebibytes": {name: round(way.cache, 2) for name, way in ways.items()},
        "peak_mebibytes": {name: way.peak and round(way.peak) for name, way in ways.items()},
    }
