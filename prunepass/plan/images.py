"""The plan for a vision-language model, which prunes the language model inside: only tokens of images may leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunepass.errors import OptionError, PlanError
from prunepass.graph.vision import ID_NAMES, candidate_ids, language_model_of
from prunepass.plan.draft import Draft, Several
from prunepass.plan.plan import PrunePlan

__all__ = ["image_plan"]


def image_plan(plan: Any, model: nn.Module) -> PrunePlan:
    """A plan for a vision-language model, of which its graph says no more.

    Args:
        plan: as `choose` gives it.
        model: with a configuration that says how many layers it has, and which tokens stand for images.

    Returns:
        The plan with the ids of the tokens that may leave, and with the last token protected, which the next one is
        predicted from.

    Raises:
        OptionError: there are several plans.
        PlanError: it names another stream, protects a segment, or merges; or nothing says which tokens are an image's.
    """
    if isinstance(plan, Several):
        raise OptionError(
            f"{type(model).__name__} has a language model inside that sees images, which is pruned by one plan. "
            "Give a single plan in place of the list."
        )
    whole = _whole(plan, model)
    decoder = language_model_of(model)
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if whole.stream not in (None, path):
        raise PlanError(
            f"The plan's stream is {whole.stream!r}, and with images the language model of {type(model).__name__} is "
            f"pruned: {path!r}. Leave the stream out, or give a plan to each part that you mean, "
            f"{{{whole.stream!r}: plan}}."
        )
    return replace(_with_ids(whole, model), stream=None)


def _whole(plan: Any, model: nn.Module) -> PrunePlan:
    if isinstance(plan, Draft):
        config: Any = model.config
        layers = config.get_text_config().num_hidden_layers
        plan = plan.completed(PrunePlan(()) if "stages" in plan.given else PrunePlan.default(layers))
    assert isinstance(plan, PrunePlan)
    return plan


def _with_ids(plan: PrunePlan, model: nn.Module) -> PrunePlan:
    if plan.protect.segment is not None:
        raise PlanError(
            "The plan protects a segment of a pair, and the prompt of a vision-language model is none. Leave "
            "Protect.segment out: text does not leave there."
        )
    if any(stage.leave == "merge" for stage in plan.stages):
        raise PlanError(
            "The plan merges tokens, and the key-value caches of a vision-language model in generate() do not say how "
            'many tokens a key stands for. Say leave="drop" for each stage.'
        )
    ids = plan.protect.only_ids or candidate_ids(model.config)
    if not ids:
        raise PlanError(
            f"The configuration of {type(model).__name__} does not say which token stands for an image (none of "
            f"{', '.join(ID_NAMES)} is in it), so it is not known which tokens may leave. Name them, "
            'Protect(only_ids=(image_token_id,)), or let text leave as well, Protect(only_ids="any").'
        )
    return replace(plan, protect=replace(plan.protect, only_ids=ids, last=max(1, plan.protect.last)))
