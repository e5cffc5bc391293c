"""What the fuzzer draws: an architecture with a head, a plan, a way through the product, and calls in some order.

Everything follows from one number, the seed, so a failure is named by it. Twenty seeds in a row share an architecture
and a head: its graph is then captured once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

import harness
import zoo
from prunepass import Protect, PrunePlan, Stage

__all__ = ["WAYS", "Call", "Episode", "draw"]

#: seeds in a row that share an architecture
GROUP = 20
#: a way through the product, and how often it is drawn. Ways that compile take seconds.
WAYS: dict[str, int] = {
    "mask": 52,
    "alone": 30,
    "program": 4,
    "eager": 3,
    "inductor": 1,
    "openvino": 2,
    "onnxruntime": 2,
    "export openvino": 2,
    "export onnx": 2,
    "export pt2": 1,
    "generate": 4,
}
ENCODER_HEADS = ("base", "sequence", "token", "question", "masked")
DECODER_HEADS = ("base", "causal", "sequence", "token")
#: blocks whose attention and feed-forward part run beside each other have no place between the two
PARALLEL = ("gpt_neox", "phi", "cohere")


@dataclass(frozen=True)
class Call:
    """One batch: rows of these lengths, padded by ``surplus`` more on one side, some with holes in their mask."""

    lengths: tuple[int, ...]
    surplus: int
    side: str
    holes: bool
    seed: int

    def inputs(self, names: tuple[str, ...], low: int = 5, high: int = zoo.VOCABULARY) -> dict[str, Tensor]:
        """int64 [B, S] tensors by name."""
        width = max(self.lengths) + self.surplus
        x = zoo.batch(list(self.lengths), width=width, side=self.side, seed=self.seed, low=low, high=high)
        if self.holes and "attention_mask" in names:
            generator = torch.Generator().manual_seed(self.seed)
            hole = torch.rand(x["attention_mask"].shape, generator=generator) < 0.2
            hole[torch.arange(len(self.lengths)), x["attention_mask"].argmax(1)] = False  # a row keeps a token
            x["attention_mask"] = x["attention_mask"] * ~hole
        return {name: zoo.with_positions(x)[name] for name in names}


@dataclass(frozen=True)
class Episode:
    """One model under one plan, called several times; each call is a case.

    Attributes:
        way: a key of `WAYS`.
        dtype: of the model's weights.
        inputs: the names of the tensors that every call passes.
    """

    seed: int
    name: str
    head: str
    way: str
    dtype: torch.dtype
    plan: PrunePlan
    inputs: tuple[str, ...]
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        stages = ", ".join(f"{s.place} {s.keep} {self.plan.scorer_of(i)}" for i, s in enumerate(self.plan.stages))
        return f"seed {self.seed}: {self.name} {self.head}, {self.way}, {self.dtype}, [{stages}], {self.plan.protect}"


@cache
def _heads(name: str) -> tuple[str, ...]:
    """The heads that `transformers` has for an architecture."""
    import transformers

    config = type(transformers.AutoConfig.for_model(zoo.SPECIES[name].model_type))
    wanted = DECODER_HEADS if zoo.SPECIES[name].causal else ENCODER_HEADS
    return tuple(h for h in wanted if config in getattr(transformers, zoo.HEADS_OF[h])._model_mapping)


def draw(seed: int, ways: dict[str, int] | None = None) -> Episode:
    """The episode of a seed."""
    group, rng = random.Random(seed // GROUP), random.Random(f"episode {seed}")
    name = group.choice(sorted(zoo.SPECIES))
    head = group.choice(_heads(name))
    weights = ways or WAYS
    way = rng.choices(list(weights), list(weights.values()))[0]
    if way == "generate" and (head != "causal" or zoo.SPECIES[name].options.get("sliding_window")):
        way = "alone"
    dtype = rng.choices([torch.float64, torch.float32, torch.bfloat16], [8, 2, 1])[0] if way == "mask" else None
    if dtype is None:
        dtype = torch.float64 if way in ("alone", "program", "generate") else torch.float32
    inputs = _inputs(rng, name, way)
    padded = "attention_mask" in inputs
    calls = tuple(_call(rng, padded) for _ in range(rng.randint(6, 14)))
    return Episode(seed, name, head, way, dtype, _plan(rng, name, head), inputs, calls)


def _inputs(rng: random.Random, name: str, way: str) -> tuple[str, ...]:
    species = zoo.SPECIES[name]
    if not species.mask or (way not in ("alone", "generate") and rng.random() < 0.15):
        return ("input_ids",)
    if species.positions == "input" and species.position_ids and (way == "alone" or rng.random() < 0.2):
        return ("input_ids", "attention_mask", "position_ids")
    return ("input_ids", "attention_mask")


def _call(rng: random.Random, padded: bool) -> Call:
    longest = rng.choice([1, 2, 3, 8, 20, 40])
    rows = rng.choice([1, 1, 2, 3, 5])
    if not padded:
        return Call((rng.randint(1, longest),) * rows, 0, "right", False, rng.randrange(10**6))
    lengths = tuple(rng.randint(1, longest) for _ in range(rows))
    surplus = rng.choice([0, 0, 0, 1, 7, 20])
    return Call(lengths, surplus, rng.choice(["right", "left"]), rng.random() < 0.15, rng.randrange(10**6))


def _keep(rng: random.Random, most: Fraction) -> Fraction:
    draws: list[Any] = [
        Fraction(rng.randint(1, 9), 10),
        Fraction(1, rng.randint(2, 50)),
        Fraction(rng.randint(1, 9998), 9999),
    ]
    return min(most, rng.choice(draws))


def _plan(rng: random.Random, name: str, head: str) -> PrunePlan:
    places = [(layer, False) for layer in range(zoo.LAYERS)]
    if name not in PARALLEL:
        places += [(layer, True) for layer in range(zoo.LAYERS)]
    chosen = sorted(rng.sample(places, rng.randint(1, 3)))
    keep, stages = Fraction(1), []
    for layer, after in chosen:
        keep = _keep(rng, keep)
        scorers: list[Any] = ["norm", {"name": "random", "seed": rng.randrange(99)}, "mlp"]
        if layer or after:
            scorers += ["attention"] * 3
        stages.append(Stage(layer, keep, rng.choice(scorers), after))
    protect = Protect(
        first=rng.choice([0, 1, 1, 3]),
        last=rng.choice([0, 0, 1, 2]),
        token_ids=tuple(rng.sample(range(5, 60), rng.choice([0, 0, 1, 9]))),
        last_share=rng.choice([Fraction(0), Fraction(0), Fraction(1, 10), Fraction(2, 7)]),
    )
    restore = rng.choice(["last", "last", "zeros"])
    return PrunePlan(tuple(stages), protect=protect, restore=restore, weights=harness.mlp_weights(tuple(stages)))
