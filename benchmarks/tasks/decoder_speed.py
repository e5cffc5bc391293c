"""Speed of a decoder of a well-known shape, dense and under SDTP's schedule: first token, decoding, memory.

Random weights and random tokens do for time. Both models come to their runtime by the same backend (the dense one by a
plan without stages) and are called in turns through ``generate()``, as users call them; predictors are as wide as the
model, as in the paper, and their time is inside.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.decoder.memory import watch_peak
from benchmarks.latency.models import LLAMA_1B
from benchmarks.latency.targets import Target, compiled, runtime_state
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.timing import p50, pair, quartile_pair
from prunepass import PrunePlan
from prunepass.cost import FlopCounter
from prunepass.dynamo.backend import compilations
from prunepass.generation.attention import install
from prunepass.scorers.mlp import predictor_shapes

_LLAMA: dict[str, Any] = {"max_position_embeddings": 32_768, "eos_token_id": None}
#: windows of 512 tokens in five of six layers
GEMMA3_270M: dict[str, Any] = {
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "vocab_size": 262_144,
    "max_position_embeddings": 32_768,
}
SHAPES: dict[str, Callable[[], Any]] = {
    "llama-1b": partial(transformers.LlamaConfig, num_hidden_layers=22, **LLAMA_1B, **_LLAMA),
    "llama-7b": partial(transformers.LlamaConfig, **_LLAMA),
    "gemma3-270m": partial(transformers.Gemma3TextConfig, **GEMMA3_270M, eos_token_id=None),
}
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
COLUMNS = (
    *("prompt", "first token, ms", "pruned", "times as fast (quartiles)", "fewer FLOPs", "reached"),
    *("tokens a second after it", "pruned", "cache, MiB", "pruned", "peak, MiB", "pruned"),
)
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Speed of a causal model, dense and with its prompt pruned"
    introduction = (
        "Random weights, one prompt, `generate()`, SDTP's schedule with predictors as wide as the model, whose "
        "time is inside; medians of calls of each way in turns. *Reached* is the share that the speed-up is of "
        "the FLOPs ratio. The peak is the most that a call holds at any time beyond the model."
    )
    model: str = option("llama-1b", "llama-1b, llama-7b or gemma3-270m, with random weights")
    target: str = option("eager", "of torch.compile: eager or inductor")
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096, 8192), "tokens of the prompts")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("bfloat16", f"of weights and computing: {', '.join(DTYPES)}")
    new: int = option(17, "tokens that are generated; the first of them ends the prefill")
    repeats: int = option(3, "calls of each way that count")
    threads: int = option(1, "PyTorch's")

    @property
    def place(self) -> Target:
        """As the latency benchmark names it."""
        precision = DTYPES[chosen(self.dtype, DTYPES, "dtype")]
        return Target(self.target, precision, compiled(self.target), self.device, getattr(torch, self.dtype))

    def cells(self) -> Iterator[Cell]:
        chosen(self.model, SHAPES, "shape")
        names = ("model", "target", "dtype", "device", "new", "threads")
        key = {name: getattr(self, name) for name in names}
        yield Cell(key, self._measure, why_not=self.place.why_not())

    def _measure(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        shared = {"precision": self.place.precision, "repeats": self.repeats}
        return shared | conditions(threads=self.threads, device=self.device), measure_speed(self)

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            shared = group.shared
            yield (
                f"## {shared['model']}, {shared['target']}, {shared['precision']}\n\n"
                f"{setting(shared)}; {shared['repeats']} calls of each way.\n\n{table(COLUMNS, map(_line, group.rows))}"
            )


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


def measure_speed(speed: Benchmark) -> Rows:
    """A row for each length; pairs hold the dense and the pruned model's figure."""
    with runtime_state(speed.threads):
        ways = _ways(speed)
        for length in speed.lengths:
            ids = torch.randint(0, ways["dense"].model.config.vocab_size, (1, length), device=speed.device)
            for way in ways.values():
                way.warm_up(ids, speed.new)
            for repeat in range(speed.repeats):
                for way in list(ways.values())[:: -1 if repeat % 2 else 1]:
                    way.call(ids, speed.new)
            both = list(ways.values())
            yield {
                "length": length,
                "flops": [way.flops(length) for way in both],
                "first_token_ms": [pair(way.first) for way in both],
                "speedup_quartiles": quartile_pair(both[0].first, both[1].first),
                "tokens_per_second": [round(p50(way.rate), 4) for way in both],
                "cache_mebibytes": [round(way.cache, 2) for way in both],
                "peak_mebibytes": [way.peak and round(way.peak) for way in both],
            }


def _ways(speed: Benchmark) -> dict[str, _Way]:
    torch.manual_seed(0)
    config = SHAPES[speed.model]()
    with torch.device(speed.device):
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=speed.place.dtype).eval()
        plan = with_predictors(PrunePlan.sdtp(config.num_hidden_layers), config.hidden_size)
    install()  # not by the first call that prunes: it would have all that was traced before traced again
    ways = {}
    for name, one in (("dense", PrunePlan(())), ("pruned", plan)):
        # the weights are shared; what torch.compile keeps on a module is not
        model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
        model.compile(backend="tokprune", options={"plan": one, "target": speed.target}, dynamic=True)
        ways[name] = _Way(model, speed.device)
    return ways


def with_predictors(plan: PrunePlan, width: int) -> PrunePlan:
    """Random ones, as wide as the model."""
    shapes = predictor_shapes(width, width)
    weights = {f"stages.{i}.{n}": 0.02 * torch.randn(s) for i in range(len(plan.stages)) for n, s in shapes.items()}
    return replace(plan, weights=weights)


def _line(row: Mapping[str, Any]) -> list[str]:
    (dense, _), (pruned, _) = row["first_token_ms"]
    low, high = row["speedup_quartiles"]
    ratio = row["flops"][0] / row["flops"][1]
    digits = {"tokens_per_second": 2, "cache_mebibytes": 1, "peak_mebibytes": 0}
    return [
        *(str(row["length"]), f"{dense:.0f}", f"{pruned:.0f}"),
        *(f"{dense / pruned:.2f} ({low:.2f} to {high:.2f})", f"{ratio:.2f}", f"{100 * dense / pruned / ratio:.0f} %"),
        *("" if v is None else f"{v:.{n}f}" for figure, n in digits.items() for v in row[figure]),
    ]
