"""The reference of pruned towers: a vision-language model whose tower hides the patches that left, in mask mode."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from vision_oracle import Reference

import vision
from prunepass import PrunePlan, ScorerSpec, Stage, prune

TOWER = PrunePlan([Stage(1, 0.4)], ScorerSpec("norm"))
#: where the towers stand
PATHS = {
    "llava": "model.vision_tower",
    "llava_next": "model.vision_tower",
    "paligemma": "model.vision_tower",
    "gemma3": "model.vision_tower",
    "aya_vision": "model.vision_tower",
    "internvl": "model.vision_tower",
    "idefics3": "model.vision_model",
    "smolvlm": "model.vision_model",
}
#: those that attend to patches of all images in one row
PACKED = {"qwen2_vl": "model.visual", "qwen2_5_vl": "model.visual", "qwen3_vl": "model.visual"}


def plans_of(name: str, language: PrunePlan | None) -> dict[str, PrunePlan]:
    """A plan for the tower and, where there is one, for the language model, by the last part of their paths."""
    both = {"text_model" if name in ("idefics3", "smolvlm") else "language_model": language, PATHS[name][6:]: TOWER}
    return {part: plan for part, plan in both.items() if plan is not None}


def hide_in_tower(model: nn.Module, name: str, plan: PrunePlan) -> None:
    """Have the tower of ``model`` run in mask mode, traced alone when it is called first."""
    clean = vision.tiny(name).get_submodule(PATHS[name])
    made: list[nn.Module] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(clean.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        given = {k: v for k, v in given.items() if v is not None}
        if not made:
            made.append(prune(clean, plan, given, mode="mask"))
        return made[0](**given)

    model.get_submodule(PATHS[name]).forward = forward


def reference(name: str, language: PrunePlan, tower: PrunePlan, prompt: int) -> Reference:
    """The language model by `vision_oracle.Reference`, which does not know of towers."""
    made = Reference(name, language, prompt)
    hide_in_tower(made.model, name, tower)
    return made
