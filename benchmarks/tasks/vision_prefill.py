"""Prefill of LLaVA's shape, dense and with image tokens leaving: first token, and what it reaches of the FLOPs ratio.

Random weights and random pictures do for time. Both models come to PyTorch by the same backend (the dense one by a plan
without stages) and are called in turns through ``generate()``, tower included, as users call them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.latency.models import LLAMA_1B
from benchmarks.latency.targets import Target, compiled, runtime_state
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.tasks.decoder_speed import DTYPES
from benchmarks.timing import in_turns, pair, quartile_pair
from prunepass import PrunePlan, Stage
from prunepass.cost import FlopCounter
from prunepass.cost.eager import EagerFlops
from prunepass.dynamo.backend import compilations
from prunepass.generation.attention import install

#: of CLIP-L at 336 pixels: 576 patches a picture
_TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_PATCHES = 576
_IMAGE = 31_999
_LONG: dict[str, Any] = {"model_type": "llama", "vocab_size": 32_064, "max_position_embeddings": 8192}
_7B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1b": LLAMA_1B | {"num_hidden_layers": 22} | _LONG,
    "llava-1.5-7b": _7B | {"num_hidden_layers": 32} | _LONG,
}
COLUMNS = (
    *("image tokens", "tokens of text", "first token, ms", "pruned", "times as fast (quartiles)"),
    *("fewer FLOPs", "reached", "tower, ms", "language model, times as fast", "fewer FLOPs", "reached"),
)


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Prefill of a vision-language model with image tokens leaving"
    introduction = (
        "LLaVA's shape with random weights and pictures, `generate()` of one token, tower and projector included. Half "
        "of the image tokens leave before block 2 (FastV's place), and half of the rest in the middle, by the scorer "
        "`prompt`. *Reached* is the share that the speed-up is of the FLOPs ratio. The language model's times are "
        "those of the whole less those of the tower and the projector, which run in the same turns."
    )
    model: str = option("llava-1b", f"{' or '.join(SHAPES)}, with random weights")
    images: tuple[int, ...] = option((1, 5), "in the prompt, 576 tokens each")
    text: int = option(64, "tokens of text")
    target: str = option("eager", "of torch.compile: eager or inductor")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option("float32", f"of weights and computing: {', '.join(DTYPES)}")
    repeats: int = option(5, "calls of each way that count")
    threads: int = option(2, "PyTorch's")

    def cells(self) -> Iterator[Cell]:
        chosen(self.model, SHAPES, "shape")
        chosen(self.dtype, DTYPES, "dtype")
        key = {name: getattr(self, name) for name in ("model", "text", "target", "dtype", "device", "threads")}
        place = Target(self.target, self.precision, compiled(self.target), self.device, getattr(torch, self.dtype))
        yield Cell(key, self._measure, why_not=place.why_not())

    @property
    def precision(self) -> str:
        """As results name the dtype."""
        return DTYPES[self.dtype]

    @property
    def plan(self) -> PrunePlan:
        """Half of the image tokens leave before block 2, half of the rest in the middle."""
        half = SHAPES[self.model]["num_hidden_layers"] // 2
        return PrunePlan((Stage(2, 0.5), Stage(half, 0.25)), "prompt")

    def _measure(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        shared = {"precision": self.precision, "repeats": self.repeats, "stages": stages_text(self.plan.stages)}
        return shared | conditions(threads=self.threads, device=self.device), self._rows()

    def _rows(self) -> Rows:
        with runtime_state(self.threads), torch.no_grad():
            models = self._models()
            for count in self.images:
                prompt = self._prompt(models["dense"], count)
                flops = {}
                for way, model in models.items():
                    known = len(compilations())
                    first_token(model, prompt, self.device)
                    result = compilations()[known].result
                    assert result is not None
                    size = tuple(prompt["input_ids"].shape)
                    flops[way] = FlopCounter(result.graph_module, batch=1, length=size[1]).total(*size)
                tower = _tower_flops(models["dense"], prompt["pixel_values"])
                ways: dict[str, Callable[[], object]] = {
                    way: partial(first_token, model, prompt, self.device) for way, model in models.items()
                }
                ways["tower"] = partial(models["dense"].model.get_image_features, pixel_values=prompt["pixel_values"])
                times = in_turns(ways, self.repeats, settle=0)
                yield {
                    "image_tokens": count * _PATCHES,
                    "flops": [flops[way] + tower for way in models],
                    "tower_flops": tower,
                    "first_token_ms": [pair(times[way]) for way in models],
                    "tower_ms": pair(times["tower"]),
                    "speedup_quartiles": quartile_pair(times["dense"], times["pruned"]),
                }
                torch._dynamo.reset()

    def _models(self) -> dict[str, Any]:
        torch.manual_seed(0)
        text = SHAPES[self.model]
        config = transformers.LlavaConfig(vision_config=_TOWER, text_config=text, image_token_index=_IMAGE)
        with torch.device(self.device):
            dense = transformers.LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, self.dtype))
        install()  # not by the first call that prunes: it would have all that was traced before traced again
        models = {}
        for way, plan in (("dense", PrunePlan(())), ("pruned", self.plan)):
            # the weights are shared; what torch.compile keeps on a module is not
            model = copy.deepcopy(dense.eval(), {id(p): p for p in dense.parameters()})
            model.compile(backend="tokprune", options={"plan": plan, "target": self.target})
            models[way] = model
        return models

    def _prompt(self, model: Any, count: int) -> dict[str, Tensor]:
        text = torch.randint(3, 31_000, (1, self.text))
        images = torch.full((1, count * _PATCHES), _IMAGE)
        ids = torch.cat([text[:, :8], images, text[:, 8:]], dim=1).to(self.device)
        size = _TOWER["image_size"]
        pixels = torch.randn(count, 3, size, size, device=self.device, dtype=model.dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            shared = group.shared
            yield (
                f"## {shared['model']}, {shared['target']}, {shared['precision']}\n\n{setting(shared)}; "
                f"{shared['repeats']} calls of each way.\n\n"
                f"{table(COLUMNS, [_line(row, shared['text']) for row in group.rows])}"
            )


def first_token(model: Any, prompt: Mapping[str, Tensor], device: str) -> float:
    """Seconds of a `generate` that makes one token."""
    began = time.perf_counter()
    model.generate(**prompt, max_new_tokens=1, do_sample=False)
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def _tower_flops(model: Any, pixels: Tensor) -> int:
    """Of the tower and the projector, counted as they run."""
    with EagerFlops() as counter:
        model.model.get_image_features(pixel_values=pixels)
    return counter.flops[""]


def _line(row: Mapping[str, Any], text: int) -> list[str]:
    (dense, _), (pruned, _) = row["first_token_ms"]
    low, high = row["speedup_quartiles"]
    ratio = row["flops"][0] / row["flops"][1]
    tower, within = row["tower_ms"][0], row["tower_flops"]
    alone = (dense - tower) / (pruned - tower)
    own = (row["flops"][0] - within) / (row["flops"][1] - within)
    return [
        *(str(row["image_tokens"]), str(text), f"{dense:.0f}", f"{pruned:.0f}"),
        *(f"{dense / pruned:.2f} ({low:.2f} to {high:.2f})", f"{ratio:.2f}", f"{100 * dense / pruned / ratio:.0f} %"),
        *(f"{tower:.0f}", f"{alone:.2f}", f"{own:.2f}", f"{100 * alone / own:.0f} %"),
    ]
