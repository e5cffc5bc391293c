"""The reference of vision-language models: the unpruned one, which hides image tokens as keys where they left."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import oracle
import vision
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.graph.vision import language_model_of

PLAN = PrunePlan([Stage(1, 0.5), Stage(2, 0.2)], ScorerSpec("norm"))
#: two images in a row that is not padded, one image, text alone
ROWS = [[5, 2, 4], [3, 7], [6]]


def positions(name: str, mask: Tensor) -> dict[str, Tensor]:
    """What `generate()` gives to models that do not count positions of images themselves."""
    return {} if name.startswith("qwen") else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


class Reference:
    """The whole unpruned model without a cache; in each layer the image tokens are hidden as keys that left before it.

    The scorers "norm" and "prompt" are known here.

    Args:
        prompt: length of the prompts, to which stages apply.
    """

    def __init__(self, name: str, plan: PrunePlan, prompt: int) -> None:
        self.model, self.name, self.plan, self.prompt = vision.tiny(name), name, plan, prompt
        self.model.set_attn_implementation("eager")
        self.alive: list[Tensor] = []
        self.attended: Tensor | None = None  # [B, H, S, S], in the layer before

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, V] of the next token."""
        decoder = language_model_of(self.model)
        assert decoder is not None
        self.alive = [inputs["attention_mask"].bool()]
        handles = []
        for i, layer in enumerate(decoder.layers):
            handles.append(layer.register_forward_pre_hook(self._hook(i, inputs), with_kwargs=True))
            handles.append(layer.self_attn.register_forward_hook(self._note))
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
                    scores = hidden.norm(dim=-1) if self.plan.scorer.name == "norm" else self._asked(inputs)
                    self.alive.append(self._kept(scores, stage.keep, inputs))
            rows, length = hidden.shape[:2]
            mask = {**given.arguments, **extra}.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            seen = mask if mask.dtype == torch.bool else mask == 0
            seen = seen.expand(rows, 1, -1, -1) & self.alive[-1][:, None, None, :]
            seen = seen | torch.eye(length, dtype=torch.bool)  # no row of a softmax is empty; nothing reads such rows
            bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
            return (), {**given.arguments, **extra, "attention_mask": bias}

        return give

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.attended = output[1]

    def _asked(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, S] attention from the last tokens of the prompt's text."""
        assert self.attended is not None
        asking = dict(self.plan.scorer.options).get("rows", 16)
        scores = torch.zeros(inputs["input_ids"].shape, dtype=torch.float64)
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            live = [t for t in range(self.prompt) if inputs["attention_mask"][row, t]]
            text = [t for t in live if ids[t] != vision.IMAGE or t in (live[0], live[-1])]
            scores[row] = self.attended[row][:, text[-asking:]].mean(dim=(0, 1))
        return scores

    def _kept(self, scores: Tensor, keep: Fraction, inputs: dict[str, Tensor]) -> Tensor:
        """[B, S] bool, row by row in plain Python: all text, and the best of the images' tokens."""
        alive = self.alive[-1].clone()
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            live = [t for t in range(self.prompt) if inputs["attention_mask"][row, t]]
            free = [t for t in live if ids[t] == vision.IMAGE and t not in (live[0], live[-1])]
            there = sorted((t for t in free if alive[row, t]), key=lambda t: (-float(scores[row, t]), t))
            alive[row, there[math.ceil(keep * len(free)) :]] = False
        return alive


def longer(name: str, inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token], 1)}
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    if kind := vision.SEERS[name].types:
        out[kind] = torch.cat([inputs[kind], torch.full_like(token, name == "paligemma")], 1)
    return out
