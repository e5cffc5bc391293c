"""A later turn: the call goes on from a cache, and of the tokens that it brings some leave.

What was cached stays as it is, so the call is read as one without a past: its keys and values are those of its own
tokens, and its masks the part that says which of these see one another. That is a prompt's graph, and the passes prune
it like one. Then the past comes back: in front of what is left of the new keys and values, and of the masks' rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.inputs import MASK_NAMES, fake_value, input_name, is_parameter
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.sizes import AXES, AxisKind
from prunepass.graph.streams import find_inputs
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.result import PruneResult
from prunepass.passes.state import Rewrite

__all__ = ["Past", "PutBackPast", "refuse_later_turns", "refuse_spelled_out", "take_out_past"]

aten = torch.ops.aten
#: axis of the tokens in keys and values
_TOKENS = 2
#: what may stand between a cache and the attention that reads it; tokens are the last axis but one in all of them
_SHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.to.dtype,
)
_HINT = "Compile without 'later_turns': later turns then keep all of their tokens. Attention must be 'sdpa'."


@dataclass
class Past:
    """What was taken out of a graph.

    Attributes:
        cached: [B, H, K, D] inputs, and the keys or values [B, H, Q, D] of the call's own tokens that follow each.
        masks: computes, from the graph's inputs, the masks of its attentions, [B or 1, 1, Q, K + Q].
        own: inputs that stand for each mask's part of the call's own tokens, [B, 1, Q, Q].
        read: which of them each attention reads.
        inputs: by number of cuts above it, the place among the graph's inputs of the first cache there.
        attention_mask: the input [B, K + Q], and the one that stands for its part of the call's own tokens.
        metas: metadata of inputs that have another name meanwhile.
    """

    cached: list[tuple[Node, Node]] = field(default_factory=list)
    masks: GraphModule | None = None
    own: list[Node] = field(default_factory=list)
    read: dict[Node, Node] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    attention_mask: tuple[Node, Node] | None = None
    metas: dict[Node, dict[str, Any]] = field(default_factory=dict)


def take_out_past(gm: GraphModule) -> Past:
    """Edit an ATen graph of several tokens that go on from a cache so that it is one of a prompt.

    Raises:
        RefusalError: masks are made in a way that could not be followed.
    """
    tokens = find_inputs(gm).tokens
    past = Past()
    joined = {n: n.args[0] for n in gm.graph.nodes if _appends(n)}
    attentions = _attentions(gm, set(joined))
    masks: list[Node] = list(dict.fromkeys(mask for _, mask in attentions))
    past.masks = _alone(gm, masks, joined, tokens)
    _own_mask(gm, past, tokens)
    for mask in masks:
        past.own.append(_stand_in(gm, f"own_{mask.name}", mask, tokens, axes=(2, 3)))
    for attention, mask in attentions:
        past.read[attention] = past.own[masks.index(mask)]
        attention.replace_input_with(mask, past.read[attention])
    for node, (cached, new) in joined.items():
        past.cached.append((cached, new))
        _follow(node)
        node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return past


def refuse_later_turns(result: PruneResult) -> None:
    """Raises `RefusalError` for a pruned prompt that later turns could not go on from by the same rules."""
    if result.spreads_caches:
        raise RefusalError(
            "the option 'later_turns' is for layers that attend to the whole text, and layers of this model attend in "
            "a window.",
            hint="Compile without 'later_turns': later turns then keep all of their tokens.",
        )
    refuse_spelled_out(result, "later_turns")


def refuse_spelled_out(result: PruneResult, option: str) -> None:
    """Raises `RefusalError` for an option that reads the masks of fused attention in later calls."""
    own = [n for block in result.blocks for n in block.attentions if n.target is not SDPA]
    if own:
        raise RefusalError(
            f"the option {option!r} is for fused attention, and this model spells its attention out.",
            where=module_path(own[0]) or own[0].name,
            hint=f"Load the model with attn_implementation='sdpa', or compile without {option!r}.",
        )


def _appends(node: Node) -> bool:
    parts: Any = node.args[0] if node.target is aten.cat.default and len(node.args) > 1 else ()
    if len(parts) != 2 or node.args[1] not in (_TOKENS, -2) or parts[0].op != "placeholder":
        return False
    return bool(fake_value(node).dim() == 4)


def _attentions(gm: GraphModule, joined: set[Node]) -> list[tuple[Node, Node]]:
    """Attentions that read caches, each with its mask."""
    found = []
    for node in gm.graph.nodes:
        if node.target is not SDPA:
            continue
        given = attention_arguments(node)
        mask, key = given.get("attn_mask"), given["key"]
        while key.target in _SHAPES and key not in joined:
            key = key.all_input_nodes[0]
        if key not in joined or not isinstance(mask, Node):
            raise RefusalError(
                "an attention of this later turn reads no cache, or has no mask, so what is past in it cannot be told.",
                where=module_path(node) or node.name,
                hint=_HINT,
            )
        found.append((node, mask))
    return found


def _alone(gm: GraphModule, masks: list[Node], joined: dict[Node, Any], tokens: Node) -> GraphModule:
    """A copy of the graph that gives the masks and nothing else."""
    copy, at = copy_with_nodes(gm)
    for node, (cached, new) in joined.items():
        # masks ask keys which slots are filled, and those of new tokens are
        with copy.graph.inserting_before(at[node]):
            rows = copy.graph.call_function(aten.sym_size.int, (at[cached], 0))
            length = copy.graph.call_function(aten.sym_size.int, (at[tokens], 1))
            heads, width = (int(fake_value(new).shape[axis]) for axis in (1, 3))
            filled = copy.graph.call_function(aten.new_ones.default, (at[cached], [rows, heads, length, width]))
        at[node].args = ([at[cached], filled], *node.args[1:])
    output = next(iter(copy.graph.find_nodes(op="output")))
    output.args = (tuple(at[mask] for mask in masks),)
    needed = {at[mask] for mask in masks}
    todo = list(needed)
    while todo:
        todo += (fresh := [a for a in todo.pop().all_input_nodes if a not in needed])
        needed.update(fresh)
    for node in reversed(copy.graph.nodes):
        if node.op not in ("placeholder", "output") and node not in needed:
            copy.graph.erase_node(node)  # whatever it asserts is asserted in the graph itself
    embeddings = {n for n in at[tokens].users if n.target is aten.embedding.default}
    content = {at[new] for _, new in joined.values()} | embeddings
    if left := [n for n in copy.graph.nodes if n in content]:
        raise RefusalError(
            "a mask is made of the states of the call's own tokens.",
            where=module_path(left[0]) or left[0].name,
            hint=_HINT,
        )
    return copy


def _own_mask(gm: GraphModule, past: Past, tokens: Node) -> None:
    """``attention_mask[:, -Q:]`` in place of the input, which nothing reads any more once the masks are gone."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(fake_value(node), Tensor) and not is_parameter(node) and input_name(node) in MASK_NAMES:
            own = _stand_in(gm, "attention_mask", node, tokens, axes=(1,))
            own.meta["prunepass_name"] = "attention_mask"
            past.metas[node] = dict(node.meta)
            node.meta = {k: v for k, v in node.meta.items() if k != "grapharg"} | {"prunepass_name": "whole_text"}
            past.attention_mask = (node, own)
            return


def _stand_in(gm: GraphModule, name: str, like: Node, tokens: Node, axes: tuple[int, ...]) -> Node:
    """An input as ``like``, with the call's own tokens along ``axes``."""
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    with gm.graph.inserting_after(last):
        made = gm.graph.placeholder(name)
    value, length = fake_value(like), fake_value(tokens).shape[1]
    shape = [length if i in axes else n for i, n in enumerate(value.shape)]
    made.meta[AXES] = dict.fromkeys(axes, AxisKind.SEQ)
    if _hint(value.shape[0]) == _hint(fake_value(tokens).shape[0]):
        made.meta[AXES][0] = AxisKind.BATCH
    with value.fake_mode:
        made.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return made


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _follow(joined: Node) -> None:
    """On the way from a cache to its attention, sizes that count the tokens of both are left to torch: -1."""
    todo = [joined]
    while todo:
        node = todo.pop()
        for user in list(node.users):
            if user.target not in _SHAPES:
                continue
            todo.append(user)
            if user.target in (aten.view.default, aten.reshape.default, aten.expand.default):
                sizes: Any = user.args[1]
                shape = list(sizes)
                shape[-2] = -1
                user.args = (user.args[0], shape, *user.args[2:])


@dataclass(frozen=True)
class PutBackPast(Pass):
    """``attention(q, k[kept], mask)`` -> ``attention(q, cat([past, k[kept]]), cat([mask of the past, mask]))``, and
    ``k[kept]`` -> ``cat([past, k[kept]])`` among the results."""

    past: Past
    name = "past"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for node in self.past.own:
            if node not in state.placeholders:
                yield Fault("It stands for a mask and is no input any more.", node)

    def run(self, state: Rewrite) -> int:
        """Returns how many keys and values were joined."""
        past = self.past
        at = self._masks(state)
        own = dict(zip(past.own, at, strict=True))
        levels = {a: state.level.get(a, 0) for block in state.blocks for a in block.attentions}
        for attention, stand_in in past.read.items():
            self._widen(state, attention, own[stand_in], levels[attention])
        for cached, new in past.cached:
            past.inputs.setdefault(state.level.get(new, 0), state.placeholders.index(cached))
            self._join(state, cached, new)
        tokens = state.inputs.tokens
        for stand_in, mask in own.items():
            self._replace(state, stand_in, mask, tokens, axis=3)
        if past.attention_mask is not None:
            whole, stand_in = past.attention_mask
            self._replace(state, stand_in, whole, tokens, axis=1)
            whole.meta = past.metas[whole]
        state.placeholders = tuple(state.graph.find_nodes(op="placeholder"))
        return len(past.cached)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for node in self.past.own:
            if node in state.placeholders:
                yield Fault("It stands for a mask and was not replaced.", node)
        for cached, _ in self.past.cached:
            if not any(user.target is aten.cat.default for user in cached.users):
                yield Fault("Nothing goes on from this cache.", cached)

    def _masks(self, state: Rewrite) -> list[Node]:
        """The masks' own graph, put in behind the inputs."""
        assert self.past.masks is not None
        inputs = {str(n.target): n for n in state.placeholders}
        env: dict[Node, Node] = {}
        before = state.last_placeholder.next
        for node in self.past.masks.graph.nodes:
            if node.op == "placeholder":
                env[node] = inputs[str(node.target)]
            elif node.op == "output":
                wanted: Any = node.args[0]
                return [env[n] for n in wanted]
            else:
                with state.graph.inserting_before(before):
                    env[node] = state.graph.node_copy(node, env.__getitem__)
                env[node].meta = dict(node.meta) | {"prunepass": {"stage": None, "pass": self.name}}
        raise AssertionError("a graph ends in its output")

    def _widen(self, state: Rewrite, attention: Node, whole: Node, level: int) -> None:
        """Columns of the past in front of a mask: [B, 1, Q', K] of the queries that are left."""
        mask = attention_arguments(attention)["attn_mask"]
        call = _Calls(state, attention)
        columns = call(aten.slice.Tensor, whole, 3, 0, self._before(call, whole, state.inputs.tokens, 3))
        rows = fake_value(state.inputs.tokens).shape[0]
        kept = state.sites[level - 1].kept if level else None
        if kept is not None:
            assert kept.positions is not None
            index = call(aten.unsqueeze.default, call(aten.unsqueeze.default, kept.positions, 1), 3)
            wide = call(aten.expand.default, columns, [call(aten.sym_size.int, state.inputs.tokens, 0), 1, -1, -1])
            index = call(aten.expand.default, index, [-1, -1, -1, call(aten.sym_size.int, wide, 3)])
            columns = call(aten.gather.default, wide, 2, index)
        queries = call(aten.sym_size.int, attention_arguments(attention)["query"], 2)
        batch = call(aten.sym_size.int, state.inputs.tokens, 0) if rows != 1 else 1
        parts = [
            call(aten.expand.default, x, [batch, 1, queries, call(aten.sym_size.int, x, 3)]) for x in (columns, mask)
        ]
        attention.replace_input_with(mask, call(aten.cat.default, parts, 3))

    def _before(self, call: _Calls, whole: Node, tokens: Node, axis: int) -> Node:
        length = call(aten.sym_size.int, tokens, 1)
        return call(operator.sub, call(aten.sym_size.int, whole, axis), length)

    def _join(self, state: Rewrite, cached: Node, new: Node) -> None:
        """The past in front of one layer's keys or values, for its attention and among the results."""
        users = [user for user in new.users if user.op != "output"]
        reading = [user for user in users if self._leads_to_attention(user)]
        first = min((n for n in reading), default=None)
        if first is not None:
            joined = _Calls(state, first)(aten.cat.default, [cached, new], _TOKENS)
            for user in reading:
                user.replace_input_with(new, joined)
            self._outgrow(state, joined)
        results = state.results()
        for node in [new, *users]:
            empty = node is not new and node.meta.get("prunepass", {}).get("pass") == "cached"
            if node in results and (node is new or empty):
                state.output.replace_input_with(
                    node, _Calls(state, state.output)(aten.cat.default, [cached, node], _TOKENS)
                )

    def _outgrow(self, state: Rewrite, joined: Node) -> None:
        """What is on the way to the attention is as long as the past and the new tokens: of no stage's length."""
        todo = [joined]
        while todo:
            for user in todo.pop().users:
                if user.target in _SHAPES:
                    state.level[user] = 0
                    user.meta.pop("val", None)
                    todo.append(user)

    def _leads_to_attention(self, node: Node) -> bool:
        todo = [node]
        while todo:
            at = todo.pop()
            if at.target is SDPA:
                return True
            if at.target in _SHAPES:
                todo += at.users
        return False

    def _replace(self, state: Rewrite, stand_in: Node, whole: Node, tokens: Node, axis: int) -> None:
        """The last Q columns of a mask in place of the input that stood for them."""
        call = _Calls(state, state.last_placeholder.next)
        if whole.op != "placeholder":
            call = _Calls(state, whole.next)
        made = call(aten.slice.Tensor, whole, axis, self._before(call, whole, tokens, axis), 2**63 - 1)
        stand_in.replace_all_uses_with(made)
        for node in state.graph.nodes:
            if (layout := node.meta.get("layout")) is not None:
                sizes = layout.sizes
                sizes.update({k: (made, axis) for k, (source, axis) in sizes.items() if source is stand_in})
        state.graph.erase_node(stand_in)


@dataclass(frozen=True)
class _Calls:
    """Inserts operators before a node, with the metadata of what they give."""

    state: Rewrite
    before: Node

    def __call__(self, function: Any, *args: Any) -> Node:
        with self.state.graph.inserting_before(self.before):
            made = self.state.graph.call_function(function, args)
        made.meta["prunepass"] = {"stage": None, "pass": PutBackPast.name}
        return made
