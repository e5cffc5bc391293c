"""Leaving the stream short: with ``restore="none"`` nothing is put back at its end.

What comes after the stream works on the tokens that are left: a final norm, the keys and values of a decoder's
cross-attention, whose mask is cut to them, and the states that the model returns. States that are returned say nothing
of which slots hold a token, so a mask is returned with them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from prunepass.errors import RefusalError
from prunepass.graph.flow import ancestors
from prunepass.graph.modules import module_path
from prunepass.graph.ops import PRODUCTS, SDPA, SOFTMAX, attention_arguments, int_argument
from prunepass.graph.sizes import Sizes
from prunepass.graph.views import VIEWS
from prunepass.passes.contract import Fault, Pass, layout_faults
from prunepass.passes.propagation import result_faults
from prunepass.passes.result import Short
from prunepass.passes.state import Rewrite

__all__ = ["MASK", "LeaveShort", "attends_to_stream", "is_memory", "mixes_memory", "note_short", "returned"]

aten = torch.ops.aten
#: name of the mask among outputs that have names; inputs of exported files have others
MASK = "encoder_attention_mask"
_HANDED_ON = {
    aten.dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    *VIEWS,
}


def is_memory(node: Node, sizes: Sizes) -> bool:
    """Whether an attention has the stream's tokens as keys and others as queries: the cross-attention of a decoder."""
    if node.target is SDPA:
        query = attention_arguments(node)["query"]
        return attends_to_stream(node, sizes) and not sizes.follows_length(query)
    axes = sizes.axes(node) or ()
    if node.target not in SOFTMAX or len(axes) < 3 or not axes[-1].is_sequence:
        return False
    return int_argument(node, 1) % len(axes) == len(axes) - 1 and sum(a.follows_length for a in axes) == 1


def attends_to_stream(node: Node, sizes: Sizes) -> bool:
    """Whether the keys of an attention are the stream's tokens."""
    if node.target is SDPA:
        return sizes.follows_length(attention_arguments(node)["key"])
    return sizes.follows_length(node)


def mixes_memory(node: Node, sizes: Sizes) -> bool:
    """Whether a node mixes tokens as cross-attention does: a softmax over the keys, or the sum of values by it."""
    if node.target is not SDPA and is_memory(node, sizes):
        return True
    value: Any = node.args[0] if node.target in PRODUCTS and node.args else None
    while isinstance(value, Node) and value.target in _HANDED_ON:
        value = value.args[0]
    return isinstance(value, Node) and value.target is not SDPA and is_memory(value, sizes)


def note_short(state: Rewrite) -> None:
    """Fills ``state.short``: the outputs that stay as short as the stream's end.

    Raises:
        RefusalError: an output has the length of another layer, or holds something else than one value a token.
    """
    end = state.stream_end
    for node in state.output.all_input_nodes:
        level = state.level.get(node, 0)
        if node is not end and (not level or not state.sizes.follows_length(node)):
            continue
        axes = state.sizes.axes(node) or ()
        behind = node is end or end in ancestors(node)
        one_each = len(axes) > 1 and axes[1].is_sequence and sum(a.follows_length for a in axes) == 1
        if not behind or not one_each:
            raise RefusalError(
                f"the model returns {node.name}, which is as long as an inner layer or no value of shape [batch, "
                "tokens, ...]: hidden states or attention probabilities of all layers, or a cache. With restore='none' "
                "it would have another length than the states at the end.",
                where=module_path(node) or node.name,
                hint="Call the model with use_cache=False, and without output_hidden_states and output_attentions; or "
                "take restore='last', which gives outputs their full length.",
            )
        state.short.append(node)
    if state.taps:
        raise RefusalError(
            "a head reads states from the middle of the model at the full length.", hint="Take restore='last'."
        )


@dataclass(frozen=True)
class LeaveShort(Pass):
    """``(h[kept], ...)`` -> ``(h[kept], ..., mask)``, where the states at the end of the stream are returned and no
    other attention in the graph reads them.

    ``mask`` is [B, K] int64, 1 at slots that hold a token, 0 at those of rows that kept fewer than others.
    """

    name = "short"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for site in state.sites:
            if site.kept is None or (state.mode == "gather" and site.narrowed is None):
                yield Fault(f"The stage {site.place} has no effect yet.", site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns 1 where a mask is returned, 0 where nothing asks for one."""
        if not _asks_for_mask(state):
            return 0
        kept = state.sites[-1].kept
        assert kept is not None
        told = kept.alive if kept.alive is not None else kept.positions
        assert told is not None
        gathers, marks = state.mode == "gather", kept.alive is not None

        def build(told: Tensor) -> Tensor:
            return told.to(torch.int64) if marks else torch.ones_like(told)

        dtype = torch.bool if marks else torch.int64
        operands = [state.operand(told, "B", "K" if gathers else "S", dtype=dtype)]
        with state.graph.inserting_before(state.output):
            made = state.inline(build, operands, stage=state.sites[-1].index, role=self.name, key=(self.name, marks))
        given = state.output.args[0]
        if isinstance(given, Node):  # one result, of a graph that says nowhere how results are arranged
            given = (given,)
        assert isinstance(given, (tuple, list))
        state.output.args = ((*given, made),)
        _arrange(state)
        return 1

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        results, asked = state.results(), _asks_for_mask(state)
        if len(results) - len(state.outputs) != int(asked):
            yield Fault(f"The graph has {len(results)} results, and had {len(state.outputs)}.", state.output)
        elif asked:
            shape = ("B", "K" if state.mode == "gather" else "S")
            yield from layout_faults(state, results[-1], "marks of slots", shape, torch.int64)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return result_faults(state)


def _asks_for_mask(state: Rewrite) -> bool:
    """Whether short states are returned, and no attention in the graph reads them."""
    return bool(state.short) and not any(is_memory(n, state.sizes) for n in state.graph.nodes if n in state.level)


def returned(state: Rewrite) -> Short | None:
    """What is returned short, with its mask; None where no mask was added."""
    if len(state.results()) == len(state.outputs) or not state.short:
        return None
    kept = state.sites[-1].kept
    places = tuple(i for i, node in enumerate(state.outputs) if node in state.short)
    return Short(places, told=kept is not None and kept.alive is not None)


def _arrange(state: Rewrite) -> None:
    """Where the graph says how its results are arranged, the mask's place in that: under its name in a mapping, else
    behind the others."""
    codegen: Any = copy.copy(state.graph._codegen)  # copies of a graph share theirs
    info = getattr(codegen, "pytree_info", None)
    if info is None or info.out_spec is None:
        return
    spec = info.out_spec
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    codegen.pytree_info = info._replace(out_spec=pytree.tree_structure(_with_mask(tree, spec.num_leaves)))
    state.graph.set_codegen(codegen)


def _with_mask(tree: Any, mask: Any) -> Any:
    if type(tree) is dict:
        return {**tree, MASK: mask}
    if isinstance(tree, dict):
        return _with_field(type(tree))(**tree, **{MASK: mask})
    return (*tree, mask) if type(tree) in (tuple, list) else (tree, mask)


_WITH_MASK: dict[type, type] = {}


def _with_field(kind: type) -> type:
    """The type of a model's output with a field more, which transformers' own functions take for ``kind``."""
    if kind not in _WITH_MASK:
        fields = {"__annotations__": {MASK: Tensor | None}, MASK: None, "__module__": __name__, "__doc__": kind.__doc__}
        _WITH_MASK[kind] = dataclass(type(f"Short{kind.__name__}", (kind,), fields))
    return _WITH_MASK[kind]
