"""DINOv2 on photographs with half of the FLOPs: vectors and finding an image again, by plans and by ToMe.

The folder that PRUNEPASS_DATA names holds ``models/dinov2-small`` and ``data/imagenet_samples/images``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import prunepass
from benchmarks.images.tome import ToMe, r_for
from benchmarks.markdown import setting, table
from benchmarks.places import cache_folder, data_folder, models_folder
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.timing import in_turns
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError

#: blocks before which tokens leave
PLACES = {
    "one at 1": (1,),
    "one at 3": (3,),
    "two": (2, 5),
    "three": (1, 4, 7),
    "each": tuple(range(1, 12)),
    "each after attention": tuple(range(11)),
    "four after attention": (0, 3, 6, 9),
}
#: scorers with options, by a name of their own
SCORERS: dict[str, dict[str, str]] = {
    "keys": {"name": "likeness", "by": "keys"},
    "keys in two sets": {"name": "likeness", "by": "keys", "sets": "two"},
}
#: width of the vectors that products of tokens with tokens are of, by scorer
_COMPARED = {"likeness": 384, "attention": 384, "keys": 64, "keys in two sets": 64}
COLUMNS = ("way", "FLOPs ratio", "cosine, class", "cosine, mean", "found by class", "found by mean")
#: patches and the class token
TOKENS = 257
Vectors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Image vectors at half of the FLOPs"
    introduction = (
        "DINOv2-small at 224 pixels: 256 patches and the class token. The class token's state and the mean over the "
        "patches are compared with the unpruned model's, and used to find each photograph by a part of it: 60 % of "
        "its area, mirrored, with other brightness and colours. Plans need no training; ToMe merges in every block."
    )
    photographs: int = option(100, "how many")
    ratio: float = option(2.0, "how many times fewer FLOPs")
    scorers: tuple[str, ...] = option(("likeness", "norm", "attention", "random"), "of the plans")
    places: tuple[str, ...] = option(tuple(PLACES), "where tokens leave")
    evenly: bool = option(False, "each stage takes as many tokens away, not the same share of those that reach it")
    leave: tuple[str, ...] = option(("drop", "merge"), "how they leave")
    adapt: str = option("", "a folder of other photographs: the model adapts to each plan on them first")
    adapt_ratio: float = option(0.0, "how many times fewer FLOPs the plan has that it adapts to (0: those of --ratio)")
    steps: int = option(800, "of 16 photographs, to adapt")
    speed: bool = option(False, "measure speed in place of quality: OpenVINO f32, dense and pruned, ToMe in PyTorch")
    speed_place: str = option("three", "whose plans are timed")
    batch: int = option(8, "images a call, for speed")
    repeats: int = option(15, "for speed")

    def cells(self) -> Iterator[Cell]:
        unknown = [place for place in (*self.places, self.speed_place) if place not in PLACES]
        if unknown:
            raise OptionError(f"There is no placement {unknown[0]!r}; there are {', '.join(PLACES)}.")
        key = {"ratio": self.ratio}
        if self.speed:
            yield Cell({**key, "speed": self.speed_place, "batch": self.batch}, self._times)
            return
        key["photographs"] = self.photographs
        if self.adapt:
            key |= {"learned_from": Path(self.adapt).name, "steps": self.steps}
            key |= {"adapt_ratio": self.adapt_ratio or self.ratio}
        else:
            yield Cell({**key, "way": "ToMe"}, partial(self._quality, "ToMe", None))
        for leave in self.leave:
            for place in self.places:
                for scorer in self.scorers:
                    way = f"{leave}, {scorer}, {place}{', evenly' * self.evenly}{', adapted' * bool(self.adapt)}"
                    yield Cell({**key, "way": way}, partial(self._quality, way, (place, scorer, leave)))

    def _quality(self, way: str, choice: tuple[str, str, str] | None, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        images, crops = _pictures(self.photographs)
        dense, ratio, embed = _dense(self.photographs), self.ratio, tome(self.ratio)
        if choice is not None:
            model = self._adapted(way, choice) if self.adapt else _model()
            plan = plan_for(self.ratio, *choice, self.evenly)
            pruned = prunepass.prune(model, plan, {"pixel_values": images[:2]})
            ratio = _flops(None) / _flops(pruned)
            embed = partial(_states_of, pruned)
        (one, mean), (query, query_mean) = _in_batches(embed, images), _in_batches(embed, crops)
        row = {
            "way": way,
            "flops_ratio": round(ratio, 3),
            "cosine_class": round(float(torch.cosine_similarity(one, dense[0]).mean()), 4),
            "cosine_mean": round(float(torch.cosine_similarity(mean, dense[1]).mean()), 4),
            "found_class": round(_found(query, one), 4),
            "found_mean": round(_found(query_mean, mean), 4),
        }
        dense_row = {
            "dense_found_class": round(_found(dense[2], dense[0]), 4),
            "dense_found_mean": round(_found(dense[3], dense[1]), 4),
        }
        return conditions("transformers", threads=torch.get_num_threads()) | dense_row, [row]

    def _adapted(self, way: str, choice: tuple[str, str, str]) -> Any:
        """The model, adapted to the way's plan at `adapt_ratio`; kept beside other trained models."""
        from transformers import AutoModel

        from benchmarks.images.learning import adapt

        ratio, photographs = self.adapt_ratio or self.ratio, Path(self.adapt)
        name = f"{way.replace(', ', '.').replace(' ', '-')}.{ratio:g}.{photographs.name}.{self.steps}"
        home = cache_folder() / "images" / name
        if not home.is_dir():
            model = AutoModel.from_pretrained(models_folder() / "dinov2-small").float()
            adapt(model, plan_for(ratio, *choice, self.evenly), photographs, steps=self.steps)
            model.save_pretrained(home)
        return AutoModel.from_pretrained(home).float().eval()

    def _times(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        """Dense and pruned through OpenVINO in float32, ToMe in PyTorch, in the same turns."""
        import openvino

        model = _model()
        images = torch.randn(self.batch, 3, 224, 224)
        plans = {"dense": PrunePlan(())}
        plans |= {
            f"{leave}, {scorer}": plan_for(self.ratio, self.speed_place, scorer, leave, self.evenly)
            for leave in self.leave
            for scorer in self.scorers
        }
        ways: dict[str, Callable[[], object]] = {}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for name, plan in plans.items():
                example = {"pixel_values": images[:2]}
                home = prunepass.export(model, plan, Path(folder, name), to="openvino", example_inputs=example)
                settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
                compiled = openvino.Core().compile_model(home / "openvino_model.xml", "CPU", settings)
                ways[name] = partial(compiled, {"pixel_values": images.numpy()})
            merging = ToMe(model, _r(self.ratio))
            ways |= {"dense, PyTorch": partial(model, images), "ToMe, PyTorch": partial(merging, images)}
            times = in_turns(ways, self.repeats)
        shared = conditions("openvino", "transformers", threads=torch.get_num_threads()) | {"repeats": self.repeats}
        return shared, ({"way": way, "ms": round(median(taken), 2)} for way, taken in times.items())

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        quality = [group for group in groups if "way" in group.shared]
        for count in dict.fromkeys(group.shared["photographs"] for group in quality):
            of = [group for group in quality if group.shared["photographs"] == count]
            first = of[0].shared
            found = (f"{first[f'dense_found_{kind}']:.3f}" for kind in ("class", "mean"))
            lines = [["unpruned", "1.00", "1.000", "1.000", *found]]
            for row in (row for group in of for row in group.rows):
                values = (f"{row[k]:.3f}" for k in ("cosine_class", "cosine_mean", "found_class", "found_mean"))
                lines.append([row["way"], f"{row['flops_ratio']:.2f}", *values])
            learned = sorted({group.shared["learned_from"] for group in of if "learned_from" in group.shared})
            said = f" *Adapted*: the model learned its own unpruned vectors on {', '.join(learned)}." * bool(learned)
            yield f"{count} photographs. {setting(first)}.{said}\n\n{table(COLUMNS, lines)}"
        for group in (group for group in groups if "speed" in group.shared):
            lines = [[row["way"], f"{row['ms']:.1f}"] for row in group.rows]
            what = f"Batch {group.shared['batch']}, plans {group.shared['speed']!r}. {setting(group.shared)}."
            yield f"{what}\n\n{table(('way', 'ms a batch'), lines)}"


def plan_for(ratio: float, place: str, scorer: str, leave: str, evenly: bool = False) -> PrunePlan:
    """The plan with ``ratio`` times fewer FLOPs in the blocks, those of its stages included.

    Args:
        evenly: whether each stage takes as many tokens away; else it keeps the same share of those that reach it.
    """
    layers, dense, after = PLACES[place], [(TOKENS, TOKENS)] * 12, place.endswith("after attention")

    def counts(step: int) -> list[int]:
        left = [TOKENS]
        for _ in layers:
            left.append(max(2, left[-1] - step) if evenly else -int(-left[-1] * Fraction(step, 1000) // 1))
        return left

    def flops(step: int) -> float:
        left = counts(step)
        behind = [left[sum(layer <= block for layer in layers)] for block in range(12)]
        inside = [TOKENS, *behind[:-1]] if after else behind
        stages = sum(stage_flops(t, k, scorer, leave) for t, k in pairwise(left))
        return block_flops(list(zip(inside, behind, strict=True))) + stages

    wanted = block_flops(dense) / ratio
    steps = range(TOKENS // len(layers)) if evenly else range(20, 1000)
    left = counts(min(steps, key=lambda step: abs(flops(step) - wanted)))
    keeps = [Fraction(count, TOKENS) for count in left[1:]]
    stages = [
        Stage(layer, keep, after_attention=after, leave=leave)  # type: ignore[arg-type]  # one of two
        for layer, keep in zip(layers, keeps, strict=True)
    ]
    return PrunePlan(stages, SCORERS.get(scorer, scorer), restore="mean" if leave == "drop" else "last")


def stage_flops(tokens: int, kept: int, scorer: str, leave: str) -> float:
    """FLOPs of a stage of width 384 that ``tokens`` reach: of products of tokens with tokens, beside which the rest is
    nothing."""
    scoring = 2 * tokens * tokens * _COMPARED.get(scorer, 0)
    hosts = _COMPARED[scorer] if scorer in SCORERS else 384
    return scoring + (2 * tokens * kept * (384 + hosts) if leave == "merge" else 0)


def block_flops(counts: list[tuple[int, int]]) -> float:
    """FLOPs of blocks of width 384, given the tokens in the attention of each and behind it."""
    width = 384
    return sum(n * width * (8 * width + 4 * n) + after * 16 * width * width for n, after in counts)


def _r(ratio: float) -> int:
    return r_for(block_flops, 257, 12, block_flops([(257, 257)] * 12) / ratio)


def tome(ratio: float) -> Callable[[Tensor], Vectors]:
    """The class token's state, and the mean over the patches, each counted once."""
    merging = ToMe(_model(), _r(ratio))

    def embed(x: Tensor) -> Vectors:
        states, sizes = merging(x)
        patches, counts = states[:, 1:], sizes[:, 1:, None]
        return states[:, 0], (patches * counts).sum(dim=1) / counts.sum(dim=1)

    return embed


@cache
def _model() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(models_folder() / "dinov2-small").float().eval()


@cache
def _pictures(count: int) -> tuple[Tensor, Tensor]:
    from benchmarks.images.photographs import photographs, pixels, queries

    images = photographs(data_folder() / "imagenet_samples" / "images", count)
    return pixels(images), pixels(queries(images))


@cache
def _dense(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embed = partial(_states_of, _model())
    images, crops = _pictures(count)
    return (*_in_batches(embed, images), *_in_batches(embed, crops))


def _states_of(model: Any, x: Tensor) -> Vectors:
    return _vectors(model(pixel_values=x).last_hidden_state)


def _vectors(states: Tensor) -> Vectors:
    return states[:, 0], states[:, 1:].mean(dim=1)


def _in_batches(embed: Callable[[Tensor], Vectors], images: Tensor) -> Vectors:
    with torch.no_grad():
        parts = [embed(batch) for batch in images.split(10)]
    one, mean = zip(*parts, strict=True)
    return torch.cat(one), torch.cat(mean)


def _found(queries: Tensor, images: Tensor) -> float:
    """Share of the queries whose own photograph is the most alike."""
    one, two = (torch.nn.functional.normalize(x, dim=-1) for x in (queries, images))
    return float(((one @ two.T).argmax(dim=-1) == torch.arange(len(one))).float().mean())


def _flops(pruned: Any) -> int:
    from prunepass.cost import FlopCounter
    from prunepass.graph.capture import capture_module

    example = {"pixel_values": torch.zeros(2, 3, 224, 224)}
    graph = capture_module(_model(), example).graph_module if pruned is None else pruned.result.graph_module
    return FlopCounter(graph).total(1, 257)
