"""A causal model as one program for the prompt and for every token after it: its key-value cache comes in and goes out.

The model is traced on a prompt, pruned, and then given a past: where a layer's keys and values start a cache, what was
there before is put in front of them. A call with many tokens prunes them, a call with one keeps it, as a stage always
keeps one token; so the prompt's graph serves both. Below a stage a cache holds the tokens that the stage kept, and
which of its slots are filled travels with it (rows of a batch keep different numbers). Where layers attend in a window,
so do the positions of its tokens, by which the window goes (`places`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from prunepass.errors import ExportError, option
from prunepass.generation.places import ReturnPositions, digits_of, number_of, split_positions
from prunepass.generation.prompted import PromptCall, image_prompt, text_prompt
from prunepass.graph.capture import capture_exported, capture_module, quiet_export
from prunepass.graph.counted import as_sizes, without_checks
from prunepass.graph.inputs import fake_value
from prunepass.graph.language_part import masks_by_index
from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.spelled import spelled_out
from prunepass.plan import PrunePlan
from prunepass.plan.draft import Planned, prunes

__all__ = ["FILLED", "TOKEN_AXIS", "StatefulProgram", "generates", "stateful_program", "without_cache"]

aten = torch.ops.aten
#: axis of the tokens in keys, values and the marks of filled slots
TOKEN_AXIS = 2
#: rows, and tokens of the prompt, that the program is traced with; caches are as long as `_PAST` and on
_ROWS, _PROMPT, _PAST = 3, 13, 5
#: what stands between a cache and the attention that reads it
_SHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.repeat_interleave.self_int,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
)
#: how the names of states begin that say which slots are filled, and where their tokens stood
FILLED, PLACES = "past_filled", "past_position"


@dataclass(frozen=True)
class StatefulProgram:
    """A program of plain tensors with its cache among them.

    Attributes:
        program: takes ``input_ids``, ``attention_mask``, ``position_ids`` [B, S], ``past_mask`` [B, P] (the mask of all
            tokens before these, pruned or not) and the states; gives ``logits`` [B, 1, V] of each row's last token and
            the states again, longer. States are keys and values [B, H, P', D]; a stage, [B, 1, P', 1] floating, 1
            where a slot is filled; and for layers of a window [B, 1, P', 3] floating, digits of the tokens' positions;
            P' is 0 at first.
        inputs, outputs: their names, in order.
        states: by name of the input, the name of the output that takes its place in the next call.
        plan: that is in it; None where none was given.
        windows: by name of the input that holds a layer's keys, how many of the last tokens its queries see at most.
            Layers whose queries may see later tokens, as those of an image do, are left out.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: Mapping[str, str]
    plan: PrunePlan | None
    windows: Mapping[str, int]


def without_cache() -> str:
    """Ends each refusal: what to do instead."""
    return f"To write it without its key-value cache, pass {option('stateful', False)}."


def generates(model: Any) -> bool:
    """Whether a model is one of transformers' that predicts the next token of a text from the text alone."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if not (callable(can_generate) and can_generate()) or getattr(config, "is_encoder_decoder", False):
        return False
    return config.get_text_config() is config  # others see or hear, too


def stateful_program(
    model: nn.Module, plan: Planned | None, images: Mapping[str, Any] | None = None
) -> StatefulProgram:
    """Prune a causal model and give it its cache as inputs and outputs.

    Args:
        model: one that predicts text from text; with ``images`` a vision-language model, of which the program holds the
            language model and its head, with the inputs of `graph.language_part.LanguagePart` beside ``past_mask``.
        plan: its last token is protected and no stage stands before block 0, as for any model that returns its cache;
            None, or one that keeps all, leaves the model as it is.
        images: example inputs of a vision-language model.

    Raises:
        ExportError: the model's cache or attention is of a kind that cannot be shortened.
        RefusalError, CaptureError: as `prunepass.prune`.
    """
    from prunepass.pipeline import PrunedModule, prune_graph

    windows = _check(model)
    tokens = max(_PROMPT, plan.tokens_to_trace if plan is not None else 0)
    pruned_by = plan if plan is not None and prunes(plan) else None
    with ExitStack() as stack:
        if images is None:
            part, inputs = model, text_prompt(model, _ROWS, tokens)
        else:
            stack.enter_context(masks_by_index())
            part, inputs = image_prompt(model, images, _ROWS, tokens, marked=pruned_by is not None)
        captured = capture_module(PromptCall(part, all_cached=any(windows)), inputs)
    gm = captured.graph_module
    given = plan if isinstance(plan, PrunePlan) else None
    if pruned_by is not None:
        extra = [ReturnPositions()] if any(windows) else []
        result = prune_graph(gm, pruned_by, copy=False, metadata=False, fewer_queries=False, extra=extra)
        given, pruned = result.plan, PrunedModule(captured, result)
        gm = capture_exported(pruned.exported).graph_module  # traced again, so that each size is known as a formula
    states = _Appending(gm, windows).run()
    # a module of the graph alone: the exported one checks that it is called with the prompt's inputs
    program, names = _exported(spelled_out(GraphModule(gm, gm.graph)), states, inputs)
    causal = images is None and not getattr(model.config, "use_bidirectional_attention", False)
    reach = {f"past_{i}_key": window for i, window in enumerate(windows) if window is not None and causal}
    outputs: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return StatefulProgram(program, names, tuple(outputs), states, given, reach)


def _check(model: nn.Module) -> list[int | None]:
    """By layer, how many positions its window holds; None where it attends to all of them."""
    from transformers import DynamicCache

    whole: Any = model.config
    config = whole.get_text_config()  # of a vision-language model that of the model inside
    layers: list[Any] = DynamicCache(config=config).layers
    kinds = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        kinds.add("chunked_attention")
    if kinds:
        raise ExportError(
            f"{type(model).__name__} has layers whose cache is not all of the text ({', '.join(sorted(kinds))}): "
            f"a recurrent state or a chunk counts positions, which pruning changes. {without_cache()}"
        )
    if getattr(config, "add_cross_attention", False):
        raise ExportError(
            f"{type(model).__name__} also attends to an encoder, whose cache is another. {without_cache()}"
        )
    if getattr(config, "_attn_implementation", "sdpa") != "sdpa":
        raise ExportError(
            f"The model's attention is {config._attn_implementation!r}; load it with attn_implementation='sdpa' to "
            f"export it with its cache. {without_cache()}"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ExportError(
            f"{type(model).__name__} takes no position_ids, so that positions would be counted by the shortened cache. "
            f"{without_cache()}"
        )
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


class _Appending:
    """Puts the past in front of what a prompt's graph caches.

    Args:
        gm: edited in place. Its outputs are those of `prompted.PromptCall`, keys and values of pruned layers zero in
            empty slots, with positions beside some of them where layers have a window (`places.ReturnPositions`).
        windows: by layer, how many positions it attends to; None for all.
    """

    def __init__(self, gm: GraphModule, windows: Sequence[int | None]) -> None:
        self._graph = gm.graph
        self._states: dict[str, str] = {}
        self._outputs: dict[str, Node] = {}
        self._filled: dict[Node, Node] = {}
        self._windows = windows
        self._own_places: dict[Node | None, Node] = {}
        self._places: dict[Node | None, tuple[Node, Node]] = {}
        self._masks: dict[tuple[Node, Node | None, int | None], Node] = {}
        self._first: Node = next(n for n in self._graph.nodes if n.op not in ("placeholder", "get_attr"))
        # tracing renames a placeholder where its name is taken; its target is the model's own word
        self._inputs = {str(n.target): n for n in self._graph.find_nodes(op="placeholder")}

    def run(self) -> dict[str, str]:
        """Returns the states: by name of the input, the name of the output."""
        output = next(iter(self._graph.find_nodes(op="output")))
        logits, *cached = torch.utils._pytree.tree_leaves(output.args[0])
        self._outputs["logits"] = logits
        self._mask = self._input("past_mask", like=self._inputs["attention_mask"])
        for i in range(0, len(cached), 2):
            for kind, node in zip(("key", "value"), cached[i : i + 2], strict=True):
                self._append(i // 2, kind, node)
        self._graph._codegen = CodeGen()
        output.args = (self._outputs,)
        self._graph.eliminate_dead_code()
        self._graph.lint()
        return self._states

    def _input(self, name: str, like: Node) -> Node:
        last = list(self._graph.find_nodes(op="placeholder"))[-1]
        with self._graph.inserting_after(last):
            made = self._graph.placeholder(name)
        made.meta["val"] = fake_value(like)
        self._inputs[name] = made
        return made

    def _call(self, before: Node, function: Any, *args: Any) -> Node:
        with self._graph.inserting_before(before):
            made = self._graph.call_function(function, args)
        with fake_value(self._inputs["input_ids"]).fake_mode:
            made.meta["val"] = function(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        return made

    def _append(self, layer: int, kind: str, cached: Node) -> None:
        """One layer's keys or values. ``cached`` is [B, H, K, D], in pruned layers with zeros in empty slots."""
        cached, places = split_positions(cached)
        alive, joined = None, cached
        if cached.target is aten.where.self:
            shaped, joined = (n for n in cached.args[:2] if isinstance(n, Node))
            alive = _source(shaped)
        if places is not None:
            self._own_places[alive] = places
        parts: Any = joined.args[0]
        if (
            joined.target is not aten.cat.default
            or joined.args[1] not in (TOKEN_AXIS, -2)
            or len(parts) != 2
            or tuple(fake_value(parts[0]).shape) != (0,)
        ):
            raise ExportError(
                f"Layer {layer} does not append its {kind}s to a cache in a way that could be followed ({joined}). "
                f"{without_cache()}"
            )
        new: Node = parts[1]
        past = self._input(f"past_{layer}_{kind}", like=new)
        own = new
        if alive is not None:  # so that what is cached is what was returned
            shaped = self._call(joined, aten.unsqueeze.default, self._call(joined, aten.unsqueeze.default, alive, 1), 3)
            own = self._call(joined, aten.where.self, shaped, new, self._call(joined, aten.zeros_like.default, new))
        length = fake_value(new).shape[TOKEN_AXIS]
        joined.args = ([past, own], TOKEN_AXIS)
        self._outputs[f"present_{layer}_{kind}"] = joined
        self._states[f"past_{layer}_{kind}"] = f"present_{layer}_{kind}"
        self._follow(joined, own, length, alive, self._windows[layer])

    def _follow(self, joined: Node, own: Node, length: Any, alive: Node | None, window: int | None) -> None:
        """From a cache to the attention that reads it: sizes on the way grow, and its mask gets columns for the past.
        A scorer that reads keys goes on reading those of this call alone."""
        chain, attentions, others = [joined], [], []
        for node in chain:
            for user in node.users:
                if user.target is SDPA:
                    attentions.append(user)
                elif user.target in _SHAPES:
                    chain.append(user)
                elif user.target not in (aten.where.self, aten.zeros_like.default, "output"):  # of the old outputs
                    others.append((user, node))
        if not attentions:
            raise ExportError(f"What reads the cache {joined.name} could not be told. {without_cache()}")
        alone = {joined: own}
        for user, node in others:
            user.replace_input_with(node, self._alone(node, alone))
        for node in chain[1:]:
            self._grow(node, joined, length)
        for attention in attentions:
            self._widen(attention, alive, window)

    def _alone(self, node: Node, known: dict[Node, Node]) -> Node:
        """A node of the way to the attention, of this call's keys or values only."""
        if node not in known:
            sources = {n: self._alone(n, known) for n in node.all_input_nodes if self._leads_to(n, known)}
            with self._graph.inserting_before(node):
                known[node] = self._graph.node_copy(node, lambda n: sources.get(n, n))
        return known[node]

    def _leads_to(self, node: Node, known: dict[Node, Node]) -> bool:
        return node in known or (node.target in _SHAPES and any(self._leads_to(n, known) for n in node.all_input_nodes))

    def _grow(self, node: Node, joined: Node, length: Any) -> None:
        """The number of tokens among a node's arguments becomes that of the cache."""

        def replaced(arg: Node) -> Node:
            value = arg.meta.get("val")
            if isinstance(value, torch.SymInt) and isinstance(length, torch.SymInt):
                if value.node.expr == length.node.expr:
                    with self._graph.inserting_after(joined):
                        return self._graph.call_function(aten.sym_size.int, (joined, TOKEN_AXIS))
                if value.node.expr.free_symbols & length.node.expr.free_symbols:
                    raise ExportError(
                        f"{node.name} reshapes cached keys or values by {value}, which could not be followed. "
                        f"{without_cache()}"
                    )
            return arg

        node.args = torch.fx.map_arg(node.args, replaced)

    def _widen(self, attention: Node, alive: Node | None, window: int | None) -> None:
        """Columns for the past in front of the mask of one attention."""
        named = attention_arguments(attention)
        mask = named.get("attn_mask")
        if not isinstance(mask, Node) or named.get("is_causal") or fake_value(mask).dtype != torch.bool:
            raise ExportError(
                f"{attention.name} has no mask, or one that holds more than which keys are seen (a bias by distance), "
                f"so that no columns for a cache could be added. {without_cache()}"
            )
        if mask in self._masks.values():
            return  # done for the keys
        if (mask, alive, window) not in self._masks:
            self._masks[mask, alive, window] = self._widened(attention, mask, alive, window)
        made = self._masks[mask, alive, window]
        attention.args = tuple(made if a is mask else a for a in attention.args)
        attention.kwargs = {k: made if a is mask else a for k, a in attention.kwargs.items()}

    def _widened(self, before: Node, mask: Node, alive: Node | None, window: int | None) -> Node:
        value = fake_value(mask)
        if alive is None:
            past = self._call(before, aten.ne.Scalar, self._mask, 0)
            past = self._call(before, aten.unsqueeze.default, self._call(before, aten.unsqueeze.default, past, 1), 1)
        else:
            past = self._call(before, aten.ne.Scalar, self._marks(alive), 0)
            past = self._call(before, aten.transpose.int, past, 2, 3)
        rows = self._call(before, aten.sym_size.int, mask, 2)
        past = self._call(before, aten.expand.default, past, [-1, -1, rows, -1])
        if window is not None:
            past = self._call(before, aten.logical_and.default, past, self._near(before, alive, window))
        own = mask
        if isinstance(value.shape[0], int) and value.shape[0] == 1:
            batch = self._call(before, aten.sym_size.int, self._inputs["input_ids"], 0)
            own = self._call(before, aten.expand.default, mask, [batch, -1, -1, -1])
        return self._call(before, aten.cat.default, [past, own], 3)

    def _near(self, before: Node, alive: Node | None, window: int) -> Node:
        """[B, 1, Q, P] bool: whether a slot's token is among the ``window`` last ones that a query sees."""
        call = partial(self._call, before)
        if alive not in self._places:
            if alive is None:
                digits = digits_of(partial(self._call, self._first), self._inputs["position_ids"])
            else:
                digits = self._own_places[alive]
            number = len(self._places)
            past = self._input(f"{PLACES}_{number}", like=digits)
            name = f"present_position_{number}"
            self._outputs[name] = self._call(before, aten.cat.default, [past, digits], TOKEN_AXIS)
            self._states[str(past.target)] = name
            self._places[alive] = (past, digits)
        past, digits = (number_of(call, at) for at in self._places[alive])
        ends = call(aten.add.Tensor, call(aten.unsqueeze.default, past, 2), window)
        return call(aten.lt.Tensor, call(aten.unsqueeze.default, digits, 3), ends)

    def _marks(self, alive: Node) -> Node:
        """The state that says which slots of the caches below a stage are filled, before this call's tokens."""
        if alive not in self._filled:
            number = len(self._filled)
            after: Node = alive.next
            marks = self._call(after, aten.to.dtype, alive, torch.float32)
            marks = self._call(after, aten.unsqueeze.default, self._call(after, aten.unsqueeze.default, marks, 1), 3)
            past = self._input(f"{FILLED}_{number}", like=marks)
            name = f"present_filled_{number}"
            self._outputs[name] = self._call(after, aten.cat.default, [past, marks], TOKEN_AXIS)
            self._states[str(past.target)] = name
            self._filled[alive] = past
        return self._filled[alive]


def _source(shaped: Any) -> Node:
    """[B, K] of what it was unsqueezed from."""
    while shaped.target in (aten.unsqueeze.default, aten.view.default, aten.reshape.default):
        shaped = shaped.args[0]
    assert isinstance(shaped, Node)
    return shaped


def _exported(
    gm: GraphModule, states: Mapping[str, str], prompt: Mapping[str, Tensor]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The program, and the names of its inputs in order."""
    placeholders = {str(n.target): n for n in gm.graph.find_nodes(op="placeholder")}
    lengths: dict[str, int] = {}  # one for all caches below the same stage
    values: dict[str, Tensor] = {}
    for name, node in placeholders.items():
        if name in prompt:
            values[name] = prompt[name]
        elif name == "past_mask":
            values[name] = torch.ones(_ROWS, _PAST, dtype=torch.int64)
        else:
            fake = fake_value(node)
            past = lengths.setdefault(str(fake.shape[TOKEN_AXIS]), _PAST + len(lengths))
            values[name] = torch.ones(_ROWS, fake.shape[1], past, fake.shape[3], dtype=fake.dtype)
    dims = {name: {0: Dim.AUTO, (TOKEN_AXIS if name in states else 1): Dim.AUTO} for name in values}
    try:
        with torch.no_grad(), quiet_export(), as_sizes(gm):
            program = without_checks(torch.export.export(gm, (), values, dynamic_shapes=dims))
    except Exception as e:  # torch's checks and every operator's have no class in common; the cause stays attached
        reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        raise ExportError(f"The model could not be exported with its cache: {reason} {without_cache()}") from e
    program._guards_code = []
    fakes = {n.name: fake_value(n) for n in program.graph.find_nodes(op="placeholder")}
    if fixed := [name for name, open_ in dims.items() if any(isinstance(fakes[name].shape[i], int) for i in open_)]:
        raise ExportError(f"A size of {fixed[0]} would be fixed by the way the model computes. {without_cache()}")
    return program, tuple(values)
