"""Graphs that are a part of a model: Dynamo splits what it cannot trace as a whole, and a plan counts all blocks.

A part that looks like a model of its own would be pruned as one: its blocks counted from 0, and tokens left out again
in each part. Parts are refused, with the place at which the model was split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import getitem
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from prunepass.dynamo.caller import modules_called
from prunepass.errors import CaptureError, RefusalError
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SDPA
from prunepass.plan.draft import Planned, prunes

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from prunepass.passes.result import PruneResult

__all__ = [
    "blamed",
    "fixed_cache_blamed",
    "refuse",
    "refuse_decoder_alone",
    "refuse_own_attention",
    "refuse_single_block",
]

_HINT = (
    "A plan needs the whole model in one graph: take out what splits it (fullgraph=True or TORCH_LOGS=graph_breaks "
    "shows it). An error of the model's own splits it, such as for an image of a size that it does not take: call it "
    "once without torch.compile to see. A quantised key-value cache splits it, too: generate with the dynamic cache, "
    "transformers' default."
)
#: transformers installs hooks for these in the first call that asks for them, which Dynamo cannot trace
_FIRST_CALL = (
    "For output_hidden_states or output_attentions of a transformers model call it once before torch.compile, with the "
    "same arguments: its first call installs hooks, which splits the graph."
)


def refuse(gm: GraphModule) -> None:
    """Raises `RefusalError` for a graph that ends where Dynamo broke off, and for one with gradient checkpointing."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if getattr(reason, "graph_break", False):
        said = next(iter(str(reason.reason).strip().splitlines()), "a graph break")
        raise RefusalError(f"torch.compile splits the model here: {said}.", where=_place(reason), hint=_HINT)
    if any(getattr(node.target, "__name__", "") == "tag_activation_checkpoint" for node in gm.graph.nodes):
        raise RefusalError(
            "gradient checkpointing is on, whose regions run a second time in the backward pass and hide what is in "
            "them from the graph.",
            hint="Switch it off, model.gradient_checkpointing_disable(), or call the model in eval mode.",
        )


def _place(reason: Any) -> str | None:
    """File and line of the innermost frame that Dynamo was in."""
    stack = getattr(reason, "user_stack", None) or ()
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None


@contextmanager
def blamed(gm: GraphModule) -> Iterator[None]:
    """What is refused in a part of a model is refused because it is one."""
    try:
        yield
    except Exception as e:  # whatever a part of a model does to the passes, that it is one is the cause
        if (whole := _whole(gm)) is None:
            raise
        said = e.reason if isinstance(e, RefusalError) else str(e).split(". ")[0].rstrip(".") + "."
        raise RefusalError(
            f"Dynamo could not trace {whole} as a whole and handed over a part that cannot be pruned alone: {said}",
            hint=f"{_HINT} {_FIRST_CALL}",
        ) from e


@contextmanager
def fixed_cache_blamed(gm: GraphModule) -> Iterator[None]:
    """What is refused in a call that writes into a static cache is refused because of that, whatever is met first: its
    masks are as wide as the cache, its windows are copied."""
    try:
        yield
    except (RefusalError, CaptureError) as e:
        if not any(_fills_cache(node) for node in gm.graph.find_nodes(op="call_method")):
            raise
        raise RefusalError(
            "the call writes into a key-value cache of fixed size, in which no layer can be shorter than others.",
            where=e.where if isinstance(e, RefusalError) else None,
            hint="Generate with the dynamic cache, transformers' default: leave out cache_implementation='static'.",
        ) from e


def _fills_cache(node: Node) -> bool:
    """Whether a call of Dynamo's graph writes keys or values into a static cache: to places of it; or, where the prompt
    is longer than the window that it holds, the prompt's end over all of it. Writing the state of a recurrence, or a
    part of a tensor, does not count."""
    into, given = node.args[0], node.args[-1]
    if not (isinstance(into, Node) and isinstance(given, Node) and _is_like_keys(into)):
        return False
    if node.target == "copy_":
        return into.target is not getitem and given.target is getitem and _is_like_keys(given.args[0])
    return node.target == "index_copy_"


def _is_like_keys(node: Any) -> bool:
    """Whether a value is floating and has the axes of keys and values, [B, H, S, D]."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def refuse_single_block(gm: GraphModule, result: PruneResult) -> None:
    """Raises `RefusalError` for one layer of a model, pruned as if it were the model."""
    if not result.sites or len(result.blocks) > 1 or result.inputs is None or result.inputs.token_ids is not None:
        return
    if (whole := _whole(gm)) is not None:
        raise RefusalError(
            f"Dynamo could not trace {whole} as a whole and handed over each of its blocks alone.", hint=_HINT
        )


def refuse_own_attention(result: PruneResult) -> None:
    """Raises `RefusalError` for a model of transformers that returns shortened caches and calls fused attention itself:
    the masks of later calls would not fit, which `prunepass.generation.attention` mends in the library's own only.
    Likewise for any model whose caches have empty slots where masks fit: it would attend to them."""
    from prunepass.passes.cached import by_interface

    if not result.returns_caches:
        return
    for node in (n for block in result.blocks for n in block.attentions if n.target is SDPA):
        trace = str(node.meta.get("stack_trace", ""))
        of_library = re.search(r"\btransformers[\\/]models[\\/]", trace) is not None
        if (of_library or result.spreads_caches) and not by_interface(node):
            raise RefusalError(
                "the model returns its key-value cache and has attention in code of its own, outside 'sdpa' and "
                "'eager' of transformers' interface, where the mask of a later call is fitted to shortened caches.",
                where=module_path(node) or node.name,
                hint="Call it with use_cache=False, or compile with fallback='dense' to run the model unpruned.",
            )


def refuse_decoder_alone(result: PruneResult, plan: Planned) -> None:
    """Raises `RefusalError` for the first step of ``generate()`` with an encoder and a decoder: it calls the encoder by
    itself, outside the graph, and what is left is a decoder with one token."""
    from prunepass.graph.inputs import fake_value, is_parameter
    from prunepass.passes.cached import goes_on_from_cache

    if result.inputs is None or result.sites or not prunes(plan):
        return
    gm = result.graph_module
    length = fake_value(result.inputs.tokens).shape[1]
    if not (isinstance(length, int) and length == 1) or goes_on_from_cache(gm):
        return
    given = [n for n in gm.graph.find_nodes(op="placeholder") if n.users and not is_parameter(n)]
    states = [v for n in given if isinstance(v := fake_value(n), Tensor) and v.dim() == 3 and v.is_floating_point()]
    if any(n is not result.inputs.tokens and fake_value(n) is v for n in given for v in states):
        raise RefusalError(
            "this call has one token of a decoder and the states of an encoder that ran outside the graph, as in "
            "generate(): nothing of it can be pruned.",
            hint="Compile the encoder: model.get_encoder().compile(backend='tokprune', options=...).",
        )


def _whole(gm: GraphModule) -> str | None:
    """What a graph is a part of: a module whose own Python code runs, or a function that goes on after a break."""
    outer = _running_modules()
    if len(outer) > 1:  # the innermost is the one being traced
        return f"{outer[-1]}.forward"
    stack = getattr(getattr(gm, "compile_subgraph_reason", None), "user_stack", None) or ()
    if any(str(frame.name).startswith("torch_dynamo_resume_in_") for frame in stack):
        return f"{outer[-1]}.forward" if outer else "the compiled function"
    return None


def _running_modules() -> list[str]:
    """Classes of the modules in whose calls Python stands, up to the compiled function, innermost first."""
    called = modules_called(up_to="compile_wrapper")
    return [type(module).__name__ for method, module in called if method == "_call_impl"]
