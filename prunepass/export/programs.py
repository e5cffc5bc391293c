"""What is exported: a program, and what is saved beside it. Two makers, one value, which one path writes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunepass.errors import CaptureError, ExportError, OptionError, RefusalError, option
from prunepass.export.pooling import STATES, VECTOR, Pooling, pooled_program
from prunepass.generation.stateful import generates, stateful_program, without_cache
from prunepass.graph.examples import longest
from prunepass.passes.result import PruneResult
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice
from prunepass.plan.draft import prunes
from prunepass.plan.images import image_plan

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from prunepass.pipeline import PrunedModule
    from prunepass.plan.levels import Levels

__all__ = ["Exportable", "whole", "with_cache"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exportable:
    """A program and what belongs to it.

    Attributes:
        program: takes tensors by name and returns a dict of tensors.
        inputs, outputs: their names, in order.
        plan: that is in it; None where nothing was said of one, or there are several.
        levels: the plans that are in it, where an input chooses among several.
        streams: by stream, the plans that are in it, where each has its own.
        beside: what else is saved in the folder: each has ``save_pretrained``.
        states: by name of an input, the name of the output that takes its place in the next call; empty where calls
            have nothing to do with each other.
        windows: by name of the state with a layer's keys, how many of the last tokens its queries see at most.
        limit: how many tokens, past ones among them, the model takes; None where it says nothing.
        aliases: by name of an output, a second name, where the format has such.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plan: PrunePlan | None
    beside: tuple[Any, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    levels: Levels | None = None
    windows: Mapping[str, int] = field(default_factory=dict)
    streams: Mapping[str, PrunePlan] = field(default_factory=dict)


def whole(
    model: Any,
    choice: Choice,
    example_inputs: Any,
    *,
    length: int | None,
    batch: int | None,
    widen: bool,
    pooling: Pooling | None = None,
) -> Exportable:
    """The model as it is called: a whole text in, its outputs out.

    Args:
        model: a module, a pruned module or an exported program.
        length, batch: sizes to fix.
        widen: whether inputs and outputs in half precision become float32.
        pooling: how the states of a text's tokens become one vector; None leaves the outputs as they are.

    Raises:
        OptionError: there are no states to pool.
        ExportError: example inputs cannot be made up, or the graph cannot be exported.
        RefusalError, CaptureError, PlanError: as `prunepass.prune`.
    """
    from prunepass.backends._plain import plain

    with choice.blamed():
        program, result = _program(model, choice, example_inputs, pooling)
    limit = longest(model)
    signature, program = plain(program, length=length, batch=batch, limit=limit, widen=widen)
    aliases = {VECTOR: STATES} if pooling is not None and pooling.form == "token" else {}
    levels = None if result is None else result.levels
    streams = {} if result is None else {str(one.plan.stream): one.plan for one in result.streams}
    return Exportable(
        program,
        signature.inputs,
        signature.outputs,
        None if result is None or levels is not None or streams else result.plan,
        _config(model),
        limit=limit,
        aliases=aliases,
        levels=levels,
        streams=streams,
    )


def with_cache(model: Any, choice: Choice, images: Any = None) -> Exportable:
    """A causal model with its cache among the inputs and outputs, for the prompt and for every token after it.

    Args:
        images: example inputs of a vision-language model, whose language model is written.

    Raises:
        OptionError: it generates no text from text.
        ExportError: its cache or attention is of a kind that cannot be shortened, or cannot be traced.
        RefusalError, PlanError: as `prunepass.prune`.
    """
    if images is None and not generates(model):
        raise OptionError(
            f"{type(model).__name__} does not generate text from text, so {option('stateful', True)} is not for it. "
            "Pass an unpruned causal model, such as one of AutoModelForCausalLM, or a vision-language model with "
            "example_inputs that hold images."
        )
    plan = choice.plan if choice.asks else None
    try:
        with choice.blamed():
            found = stateful_program(model, plan if images is None or plan is None else image_plan(plan, model), images)
    except RefusalError as e:
        raise RefusalError(e.reason, where=e.where, hint=" ".join(filter(None, (e.hint, without_cache())))) from e
    except CaptureError as e:
        raise ExportError(f"{type(model).__name__} could not be traced with its cache. {without_cache()} {e}") from e
    config = deepcopy(model.config)
    config.use_cache = True
    beside = (config, model.generation_config)
    return Exportable(
        found.program,
        found.inputs,
        found.outputs,
        found.plan,
        beside,
        found.states,
        longest(model),
        windows=found.windows,
    )


def _config(model: Any) -> tuple[Any, ...]:
    config = getattr(model, "config", None)
    return (config,) if hasattr(config, "save_pretrained") else ()


def _program(
    model: Any, choice: Choice, example_inputs: Any, pooling: Pooling | None
) -> tuple[ExportedProgram, PruneResult | None]:
    """The program to write, and how it was pruned."""
    from torch.export import ExportedProgram

    from prunepass.pipeline import PrunedModule, prune, prune_program

    if isinstance(model, PrunedModule):
        if choice.asks and choice.plan not in (model.plan, PrunePlan(())):
            raise ExportError(
                "This module is pruned already. Pass plan=None to write it as it is, or the original model."
            )
        return _pooled(model.exported, pooling, model), model.result
    if not choice.asks or pooling is not None:
        program = model if isinstance(model, ExportedProgram) else _captured(model, example_inputs)
        program = _pooled(program, pooling, model)
        return _pruned_to_pool(program, choice, pooling) if choice.asks and pooling else (program, None)
    if isinstance(model, ExportedProgram):
        return prune_program(model, choice)
    inputs = example_inputs if example_inputs is not None else _made_up_inputs(model)
    pruned = prune(model, choice, inputs)
    if isinstance(pruned, PrunedModule):
        return _warned(pruned).exported, pruned.result
    assert isinstance(choice.plan, PrunePlan)  # every keep is 1
    program = _captured(model, inputs)
    return program, PruneResult(program.graph_module, choice.plan, "gather")


def _pooled(program: ExportedProgram, pooling: Pooling | None, model: Any) -> ExportedProgram:
    return program if pooling is None else pooled_program(program, pooling, type(model).__name__)


def _pruned_to_pool(program: ExportedProgram, choice: Choice, pooling: Pooling) -> tuple[ExportedProgram, PruneResult]:
    """A program that ends in a pool, pruned, with what is restored for the pool alone left out where that is sound."""
    from prunepass.graph.capture import capture_exported
    from prunepass.passes.pool import PoolKept
    from prunepass.pipeline import PrunedModule, prune_captured

    if isinstance(choice.plan, PrunePlan) and not prunes(choice.plan):
        return program, PruneResult(program.graph_module, choice.plan, "gather")
    captured = capture_exported(program)
    result = prune_captured(captured, choice.plan, before_restore=(PoolKept(),))
    pruned = PrunedModule(captured, result)
    if pooling.mode == "mean":  # the other two read protected tokens
        _warned(pruned)
    return pruned.exported, result


def _captured(model: nn.Module, example_inputs: Any) -> ExportedProgram:
    from prunepass.graph.capture import capture_module
    from prunepass.graph.language_part import capture_part
    from prunepass.graph.vision import image_decoder

    if (decoder := image_decoder(model, example_inputs)) is not None:
        return capture_part(model, decoder, example_inputs, marked=False)[0].exported
    return capture_module(model, example_inputs if example_inputs is not None else _made_up_inputs(model)).exported


def _warned(pruned: PrunedModule) -> PrunedModule:
    from prunepass.passes.default_plan import head_warning

    if pruned.result.restored and (warning := head_warning(pruned.plan, pruned.result.reads)):
        logger.warning("%s", warning)
    return pruned


def _made_up_inputs(model: nn.Module) -> dict[str, Any]:
    """Two rows of tokens, from the model's config and the arguments that its ``forward`` takes."""
    import torch

    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    arguments = inspect.signature(model.forward).parameters
    if vocabulary is None or "input_ids" not in arguments:
        raise ExportError(
            f"{type(model).__name__} has no config with a vocab_size, or takes no input_ids, so example inputs cannot "
            "be made up. Pass example_inputs, for instance {'input_ids': ..., 'attention_mask': ...}."
        )
    length = min(16, longest(model) or 16)
    ids = torch.arange(2 * length).reshape(2, length) % vocabulary
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in arguments:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in arguments and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    return inputs
