"""Plans for several parts of a model: towers of a vision-language model are programs of their own, beside that of its
language model; streams of one graph are in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunepass.errors import ExportError, OptionError, option
from prunepass.export.programs import Exportable, whole
from prunepass.graph.examples import checked
from prunepass.graph.language_part import CallReader
from prunepass.graph.vision import decoder_of_parts, language_model_of
from prunepass.graph.wrappers import is_pruned
from prunepass.passes.pruned import PrunedModule
from prunepass.passes.pruned_vision import PrunedTower, PrunedVision, pruned_towers
from prunepass.plan import PrunePlan
from prunepass.plan.by_stream import StreamPlans, plans_by_stream
from prunepass.plan.choice import Choice, names_streams

__all__ = ["language_choice", "plans_to_write", "streams_pruned", "towers_to_write"]

_NO_PLAN = Choice(PrunePlan(()), "no plan", asks=False)


def streams_pruned(model: Any, plan: Any, example: Any) -> tuple[Any, Any]:
    """The model with the streams of its graph pruned, and no plan, where ``plan`` has one for each; both as they are
    for any other plan, and for a vision-language model.

    Raises:
        As `prunepass.prune`.
    """
    from prunepass.pipeline import prune

    if not names_streams(plan) or is_pruned(model) or language_model_of(model) is not None:
        return model, plan
    pruned = prune(model, plan, example)
    return pruned, None if is_pruned(pruned) else PrunePlan(())


def plans_to_write(model: Any, plan: Mapping[str, Any], example: Any, *, int8: Any, pooled: bool) -> StreamPlans:
    """What a mapping of streams to plans says, for `export`.

    Raises:
        ExportError: the model is pruned already.
        OptionError: there are no images in ``example``; an option that does not go with several parts.
        PlanError, WeightsError: as `plans_by_stream`.
    """
    if is_pruned(model):
        raise ExportError("This module is pruned already. Pass plan=None to write it as it is, or the original model.")
    plans = plans_by_stream(plan, model)
    decoder_of_parts(model, example)
    if pooled:
        raise OptionError(
            f"{option('pooled', True)} writes one vector a text, and a vision-language model puts out logits. Leave it "
            "out."
        )
    if not isinstance(int8, bool):
        raise OptionError(
            f"The batches of {option('int8')} are inputs of one program, and plans for several parts write several. "
            "Export each part by itself, or leave the batches out."
        )
    return plans


def language_choice(plans: StreamPlans) -> Choice:
    """The language model's plan; where there is none, it is written as it is."""
    return plans.language or _NO_PLAN


def towers_to_write(model: Any, plans: StreamPlans | None, example: Any, *, widen: bool) -> dict[str, Exportable]:
    """The programs of towers that are pruned, by path: of a model that is so already, or by these plans.

    Args:
        example: keyword arguments of ``model``, with images, where plans are given.
        widen: as for `whole`.

    Raises:
        RefusalError, CaptureError, PlanError, WeightsError: as `prunepass.prune`.
        ExportError: the graph cannot be exported.
    """
    towers: Mapping[str, PrunedModule] = {}
    if isinstance(model, PrunedVision):
        towers = model.towers
    elif plans is not None and plans.towers:
        towers = {path: tower.pruned for path, tower in _pruned(model, plans, example).items()}
    return {path: whole(tower, _NO_PLAN, None, length=None, batch=None, widen=widen) for path, tower in towers.items()}


def _pruned(model: nn.Module, plans: StreamPlans, example: Any) -> dict[str, PrunedTower]:
    from prunepass.pipeline import prune

    decoder = decoder_of_parts(model, example)
    _, given = checked(model, example)
    with torch.no_grad():
        reader, _ = CallReader.of(model, decoder, given)
    return pruned_towers(reader, plans.towers, given, prune)
