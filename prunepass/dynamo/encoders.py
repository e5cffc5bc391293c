"""Encoder-decoders: ``generate()`` calls the encoder by itself, and then the compiled model with its states.

Compiling such a model in place compiles its encoder as well, with the same options. So the encoder is pruned in
``generate()``, too, and the graphs of the decoder, in which there is nothing to prune, go to the target as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunepass.dynamo.caller import modules_called
from prunepass.errors import RefusalError
from prunepass.generation.encoders import Marks, mark, marks_of
from prunepass.graph.inputs import fake_value, source_name

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from prunepass.passes.result import PruneResult

__all__ = ["checking", "compile_encoder", "marking", "states_given"]

#: models that were compiled in place, and their encoders
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_encoders: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_encoder(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile the encoder of a model that generates with an encoder and a decoder, in place.

    Raises:
        RefusalError: the model has no encoder that can be found.
    """
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if not getattr(config, "is_encoder_decoder", False) or not callable(can_generate) or not can_generate():
        return
    find = getattr(model, "get_encoder", None)
    encoder = find() if callable(find) else None
    if not isinstance(encoder, nn.Module) or encoder is model:
        raise RefusalError(
            f"{type(model).__name__} generates with an encoder and a decoder, and its get_encoder() gives no encoder.",
            hint="Compile the module that encodes, encoder.compile(backend='tokprune', options=...), and leave the "
            "model as it is.",
        )
    _models.add(model)
    _encoders.add(encoder)
    encoder.compile(backend="tokprune", options=dict(options))


def states_given(gm: GraphModule) -> int | None:
    """In a graph of a compiled model that is called with ``encoder_outputs``, as ``generate()`` does: the place of the
    states among the inputs. None for any other graph."""
    if not any(module in _models for _, module in modules_called()):
        return None
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = fake_value(node)
        is_states = isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
        if is_states and "encoder_outputs" in source_name(node):
            return place
    return None


def checking(lowered: Callable[..., Any], place: int, *, dense: bool) -> Callable[..., Any]:
    """The graph of a decoder, which raises `RefusalError` where its states are of an encoder that was not pruned.

    Args:
        dense: whether it runs on those as well.
    """

    def run(*args: Any) -> Any:
        if marks_of(args[place]) is None and not dense:
            raise RefusalError(
                "the call was given states that no pruned encoder returned (encoder_outputs), so nothing of it is "
                "pruned.",
                hint="Leave encoder_outputs out, or compute them by model.get_encoder() of the compiled model.",
            )
        return lowered(*args)

    return run


def marking(lowered: Callable[..., Any], result: PruneResult) -> Callable[..., Any]:
    """The graph of an encoder, with what is known of its states beside them. Of short ones the graph also returns a
    mask, which is taken off."""
    short = result.short
    if short is None and not any(module in _encoders for _, module in modules_called()):
        return lowered

    def run(*args: Any) -> Any:
        results: Sequence[Any] = lowered(*args)
        if short is None:
            for value in results:
                if isinstance(value, Tensor) and value.dim() == 3:
                    mark(value, Marks())
            return results
        for place in short.states:
            mark(results[place], Marks(results[-1], short.told))
        return results[:-1]

    return run
