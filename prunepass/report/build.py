"""`explain`: what a plan, or a plan for each of several parts, does to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.graph.capture import Inputs, capture_module
from prunepass.graph.vision import image_decoder, language_model_of
from prunepass.graph.wrappers import unwrapped
from prunepass.plan.by_stream import StreamPlans, plans_by_stream, plans_of_streams
from prunepass.plan.choice import AnyPlan, alone, choose, names_streams
from prunepass.report.parts import report_on_parts
from prunepass.report.report import Report
from prunepass.report.streams import report_on_streams
from prunepass.report.traced import BATCH_SIZE, Asked, report_on

__all__ = ["Report", "explain"]


def explain(
    model: nn.Module,
    plan: AnyPlan,
    example_inputs: Inputs | Tensor,
    *,
    target: str | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    tokenizer: Any = None,
    text: str | None = None,
) -> Report:
    """What ``plan`` does to ``model``: blocks, stages, tokens, FLOPs, passes, fusions, and a sentence token by token.

    Args:
        plan: a `PrunePlan`, a folder or JSON text of one. None takes the plan in the folder that the model was loaded
            from, and where there is none, the default one, which "default" always does. For a vision-language model
            with images, a mapping of streams to plans: {"language_model": ..., "vision_tower": ...}, by the path of a
            module or its end; likewise of a model with several residual streams in one graph. See `prune`.
        example_inputs: keyword arguments (a mapping) or positional ones; the figures "on the example" are at its shape.
            With ``pixel_values`` among those of a vision-language model the report has ``parts``, one for its language
            model and one for each tower that has a plan, and ``whole``, the FLOPs of all of it.
        target: a runtime ("openvino", ...): count the fusions it keeps, which means compiling both graphs for it. Of a
            plan that prunes nothing, the pruned figures are then those of `torch.compile`, see `Report.exact`; without
            a target they are the model's, which `prune` and `export` leave as it is.
        lengths: live tokens of each row of a corpus, for the FLOPs; those of the example where it is not given.
        batch_size: rows a batch in that corpus.
        max_length: what the first denominator pads to; else what the tokenizer, the graph or the config allow.
        tokenizer: of transformers; shows tokens as words, and is needed for ``text``.
        text: a sentence to follow through the blocks; the example's first row where it is not given.

    Returns:
        A `Report`. A plan that the model refuses is no error here: the report says why. Its ``exact`` is what the dense
        model takes without the tokens that no result needs, and None where results need them all.

    Raises:
        CaptureError: the model, or a part that has a plan, cannot be traced.
        RefusalError: it is pruned already, or its code cannot be read; a tower gets the patches of all images in one
            row; a stream with a plan leads into another one.
        OptionError: ``model`` is no model, inputs that cannot be its own, ``text`` without a tokenizer, a length beyond
            the maximum, an unknown target; ``lengths``, ``max_length`` or ``text`` with images or plans for several
            streams; plans for parts of a vision-language model without images.
        PlanError: a mapping names no part of the model; a plan is none for a prompt with images.
    """
    if text is not None and tokenizer is None:
        raise OptionError("explain(text=...) needs the tokenizer that turns the text into ids: pass tokenizer=.")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    model = unwrapped(model, "explain")
    asked = Asked(target, lengths, batch_size, max_length, tokenizer, text)
    if names_streams(plan) and language_model_of(model) is None:
        choices, captured = plans_of_streams(plan, model), capture_module(model, example_inputs)
        return report_on_streams(model, choices, captured, example_inputs, asked)
    if names_streams(plan):
        return report_on_parts(model, plans_by_stream(plan, model), example_inputs, asked)
    choice = alone(choose(plan, model))
    if image_decoder(model, example_inputs) is not None:
        return report_on_parts(model, StreamPlans(choice), example_inputs, asked)
    return report_on(model, choice, capture_module(model, example_inputs), example_inputs, asked)[0]
