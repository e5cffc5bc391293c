"""Vision-language models: `generate()` with image tokens that leave, against the unpruned model that hides them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import vision
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.dynamo.backend import compilations
from prunepass.dynamo.vision import language_model_of

PLAN = PrunePlan([Stage(1, 0.5), Stage(2, 0.2)], ScorerSpec("norm"))
#: two images in a row that is not padded, one image, text alone
ROWS = [[5, 2, 4], [3, 7], [6]]
STEPS = 3
DAILY = ("llava", "qwen3_vl", "gemma3")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def some(names: Sequence[str] = tuple(vision.SEERS), daily: Sequence[str] = DAILY) -> list[Any]:
    return [pytest.param(n, marks=() if n in daily else pytest.mark.slow) for n in names]


def compiled(model: Any, plan: Any = PLAN, target: str = "eager", **options: Any) -> Any:
    model.compile(backend="tokprune", options={"plan": plan, "target": target, **options})
    return model


def positions(name: str, mask: Tensor) -> dict[str, Tensor]:
    """What `generate()` gives to models that do not count positions of images themselves."""
    return {} if name.startswith("qwen") else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


class Reference:
    """The whole unpruned model without a cache; in each layer the image tokens are hidden as keys that left before it.

    Args:
        prompt: length of the prompts, to which stages apply.
    """

    def __init__(self, name: str, plan: PrunePlan, prompt: int, ids: Sequence[int] = (vision.IMAGE,)) -> None:
        self.model, self.name, self.plan, self.prompt, self.ids = vision.tiny(name), name, plan, prompt, ids
        self.alive: list[Tensor] = []

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, V] of the next token."""
        decoder = language_model_of(self.model)
        assert decoder is not None
        self.alive = [inputs["attention_mask"].bool()]
        handles = [
            layer.register_forward_pre_hook(self._hook(i, inputs), with_kwargs=True)
            for i, layer in enumerate(decoder.layers)
        ]
        try:
            with torch.no_grad(), oracle.float64_softmax():
                given = {**inputs, **positions(self.name, inputs["attention_mask"])}
                found: Tensor = self.model(**given, use_cache=False).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _hook(self, number: int, inputs: dict[str, Tensor]) -> Any:
        def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            extra = given.arguments.pop("kwargs", {})
            hidden = next(iter(given.arguments.values()))
            for stage in self.plan.stages:
                if stage.layer == number:
                    self.alive.append(self._kept(hidden.norm(dim=-1), stage.keep, inputs))
            rows, length = hidden.shape[:2]
            mask = {**given.arguments, **extra}.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            seen = mask if mask.dtype == torch.bool else mask == 0
            seen = seen.expand(rows, 1, -1, -1) & self.alive[-1][:, None, None, :]
            seen = seen | torch.eye(length, dtype=torch.bool)  # no row of a softmax is empty; nothing reads such rows
            return (), {**given.arguments, **extra, "attention_mask": seen}

        return give

    def _kept(self, scores: Tensor, keep: Fraction, inputs: dict[str, Tensor]) -> Tensor:
        """[B, S] bool, row by row in plain Python: all text, and the best of the images' tokens."""
        alive = self.alive[-1].clone()
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            live = [t for t in range(self.prompt) if inputs["attention_mask"][row, t]]
            free = [t for t in live if ids[t] in self.ids and t not in (live[0], live[-1])]
            there = sorted((t for t in free if alive[row, t]), key=lambda t: (-float(scores[row, t]), t))
            alive[row, there[math.ceil(keep * len(free)) :]] = False
        return alive


def longer(name: str, inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token], 1)}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    if kind := vision.SEERS[name].types:
        out[kind] = torch.cat([inputs[kind], torch.full_like(token, name == "paligemma")], 1)
    return out


def check_greedy(name: str, rows: list[list[int]], plan: PrunePlan = PLAN, steps: int = STEPS, **text: Any) -> Any:
    """Prefill and greedy steps, each against the reference; returns the cache."""
    fast, inputs = compiled(vision.tiny(name), plan), vision.prompt(name, rows)
    reference, cache = Reference(name, plan, inputs["input_ids"].shape[1]), None
    for step in range(steps):
        mask = inputs["attention_mask"]
        given = {**inputs, **positions(name, mask)}
        if step:
            beside = {k: v[:, -1:] for k, v in positions(name, mask).items()}
            if name.startswith("qwen"):
                behind = (mask.cumsum(1) - 1)[None, :, -1:] + fast.model.rope_deltas
                beside = {"position_ids": behind.expand(3, -1, -1)}
            given = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask, **beside}
        with torch.no_grad(), oracle.float64_softmax():
            found = fast(**given, past_key_values=cache, use_cache=True)
        exact = reference.logits(inputs)
        assert (found.logits[:, -1] - exact).abs().max() < 1e-10, (name, step)
        cache = found.past_key_values
        inputs = longer(name, inputs, exact.argmax(-1, keepdim=True))
    return cache


@pytest.mark.parametrize("name", some())
def test_later_tokens_see_what_layers_kept_of_images(name: str) -> None:
    cache = check_greedy(name, ROWS)
    tokens = vision.SEERS[name].tokens
    if name in ("gemma3", "aya_vision"):
        return  # caches of windows hold a slot for each position
    whole = 11 + 4 + 2 * tokens
    kept = [11 + 4 + max(math.ceil(2 * tokens * k), 0) for k in (Fraction(1, 2), Fraction(1, 5))]
    assert [layer.keys.shape[2] - STEPS + 1 for layer in cache.layers] == [whole, *kept, kept[-1]]
