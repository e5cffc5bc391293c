"""Key-value caches: a pruned layer's keys and values leave the graph at the length it ran at.

During generation the first call runs on the prompt and returns every layer's keys and values; each later call appends
one token to them. A pruned layer's cache holds the tokens it kept, and a new token attends to those: what was pruned is
gone for good, as SDTP has it. Later calls are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.inputs import fake_value
from prunepass.graph.modules import module_path
from prunepass.graph.ops import PRODUCTS, SDPA, attention_arguments
from prunepass.passes.contract import Fault, Pass, is_ours
from prunepass.passes.propagation import result_faults
from prunepass.passes.state import Rewrite

aten = torch.ops.aten

__all__ = [
    "EmptySlots",
    "by_interface",
    "goes_on_from_cache",
    "is_cached",
    "is_drafted",
    "reads_made",
    "refuse_fixed_cache",
    "refuse_generation",
]


def goes_on_from_cache(gm: GraphModule) -> bool:
    """Whether an input of an ATen graph is a cache that the call appends to. Such calls are not pruned: most have one
    token, and the others (a further turn of a chat, drafted tokens) must keep theirs."""
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(fake_value(n), Tensor)]
    states = [n for n in inputs if fake_value(n).dim() == 4 and fake_value(n).is_floating_point()]
    return any(_appends(user) for node in states for user in node.users)


def _appends(node: Node) -> bool:
    """``cat([cache, new], dim=-2)``: along the tokens of [B, H, S, D]."""
    return node.target is aten.cat.default and len(node.args) > 1 and node.args[1] in (2, -2)


def refuse_fixed_cache(node: Node, rewrite: Rewrite) -> None:
    """Raises `RefusalError` for a write of a pruned layer's keys or values into a cache of fixed size."""
    if node.target in (aten.index_copy.default, aten.index_copy_.default) and rewrite.value(node).dim() == 4:
        raise RefusalError(
            "the call writes into a key-value cache of fixed size, in which no layer can be shorter than others.",
            where=module_path(node) or node.name,
            hint="Generate with the dynamic cache, transformers' default: leave out cache_implementation='static'.",
        )


def is_cached(node: Node, rewrite: Rewrite) -> bool:
    """Whether an output is what its block's attention reads as keys or values: [B, H, S, D], and not a window of
    it, which would count tokens where it means positions."""
    axes = rewrite.sizes.axes(node) or ()
    if len(axes) != 4 or [i for i, axis in enumerate(axes) if axis.follows_length] != [2] or not axes[2].is_sequence:
        return False
    stream = {n for block in rewrite.blocks for n in (block.start, block.after_attention, block.end)}
    attentions = {n for block in rewrite.blocks for n in block.attentions}
    after = _below(attentions, stream)
    # keys lead to an attention; values may meet one that is a softmax in a product after it
    return any(n in attentions or n in after for n in _below([node], stream))


def _below(nodes: Iterable[Node], stop: set[Node]) -> set[Node]:
    """What depends on ``nodes``, up to ``stop``."""
    todo, seen = list(nodes), set[Node]()
    while todo:
        for user in todo.pop().users:
            if user not in seen and user not in stop:
                seen.add(user)
                todo.append(user)
    return seen


def refuse_generation(rewrite: Rewrite) -> None:
    """Raises `RefusalError` where shortened caches would silently give wrong continuations."""
    plan, first = rewrite.plan, rewrite.sites[0]
    if any(site.stage.leave == "merge" for site in rewrite.sites):
        raise RefusalError(
            "the model returns its key-value cache and the plan merges tokens. What later calls append would meet keys "
            "that stand for several tokens, which no cache says.",
            hint="Generate with stages that say leave='drop'; where no cache is needed, call with use_cache=False.",
        )
    if first.cut is rewrite.blocks[0].start:
        raise RefusalError(
            "the model returns its key-value cache and the plan has a stage before block 0. Positions of new tokens "
            "are counted by the first layer's cache, which must hold the whole prompt.",
            hint="Place the first stage at layer 1 or later; where no cache is needed, call with use_cache=False.",
        )
    if not plan.protect.always_last:
        raise RefusalError(
            "the model returns its key-value cache, so the next token is predicted from the prompt's last one, which "
            "the plan does not protect.",
            hint='Give the plan Protect(last=1); as an option: "protect": {"first": 4, "last": 1}. '
            "Where no cache is needed, call with use_cache=False.",
        )
    if drafts := _tokens_read(rewrite):
        raise RefusalError(
            f"the model returns its key-value cache and logits of its last {drafts} tokens, as drafting ones (assisted "
            "decoding) asks for. Drafted tokens would be pruned with the prompt.",
            hint="Generate without an assistant or prompt lookup; for scores of several tokens call the model with "
            "use_cache=False.",
        )
    softmaxes = [n for block in rewrite.blocks for n in block.attentions if n.target is not SDPA]
    if own := [n for n in softmaxes if not by_interface(n)]:
        raise RefusalError(
            "the model returns its key-value cache and spells its attention out in code of its own, outside 'eager' of "
            "transformers' interface, where the mask of a later call is fitted to shortened caches.",
            where=module_path(own[0]) or own[0].name,
            hint="Call it with use_cache=False, or compile with fallback='dense' to run the model unpruned.",
        )
    for node in (n for block in rewrite.blocks for n in block.attentions):
        if (mask := _mask_of_content(rewrite, node)) is not None:
            raise RefusalError(
                f"the model returns its key-value cache, and each layer makes a mask of its own from hidden states "
                f"({mask.name}). Made from a shortened cache it would not say which of its slots are empty.",
                where=module_path(node) or node.name,
                hint="Call it with use_cache=False, or compile with fallback='dense' to run the model unpruned.",
            )


def _mask_of_content(rewrite: Rewrite, attention: Node) -> Node | None:
    """What an attention below a cut masks or adds to its scores, where hidden states tell it."""
    if attention.target is SDPA:
        given = attention_arguments(attention)
        mask = _without_empty_slots(given.get("attn_mask"), given["key"])
        return mask if isinstance(mask, Node) and rewrite.level.get(mask) else None
    todo, seen = [attention], set[Node]()
    while todo:
        node = todo.pop()
        if node.target is aten.linear.default:
            return node
        if node in seen or node.target in PRODUCTS or not rewrite.level.get(node):
            continue
        seen.add(node)
        todo += node.all_input_nodes
    return None


def _without_empty_slots(mask: Any, key: Any) -> Any:
    """A mask before `generation.attention.filled_slots` hid the empty slots among the attention's own keys in it.

    transformers cuts Gemma 4's last layers to the prompt's last token, and a call with fewer queries than keys looks
    like one with a cache. What is read off the keys holds for shortened keys, too.
    """
    if not isinstance(mask, Node) or mask.target not in _HIDING:
        return mask
    parts = [part for part in mask.args if isinstance(part, Node)]
    others = [part for part in parts if not _reads_slots(part, key)]
    return others[0] if len(others) == len(parts) - 1 == 1 else mask


def _reads_slots(node: Node, key: Any) -> bool:
    """Whether it is one head of ``key`` compared with zero, and what was made of that by shape alone."""
    heads = {key}  # repeated for each query head, and before that
    while isinstance(key, Node) and key.target in _REPEATING:
        key = key.args[0]
        heads.add(key)
    compared = False
    while node not in heads and node.target in _READING:
        compared |= node.target is aten.ne.Scalar
        node = node.args[0]  # type: ignore[assignment]  # of these operators a node
    return compared and node in heads


_HIDING = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.where.self, aten.where.ScalarOther)
_REPEATING = (aten.expand.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.clone.default)
_READING = (aten.unsqueeze.default, aten.any.dim, aten.ne.Scalar, aten.select.int)


def by_interface(attention: Node) -> bool:
    """Whether an attention was called through `prunepass.generation.attention`, which transformers' interface gives for
    "sdpa" and "eager": so will it be in later calls, whose masks are mended there."""
    return "attend_over_caches" in str(attention.meta.get("stack_trace", ""))


def _tokens_read(rewrite: Rewrite) -> int | None:
    """How many of the last tokens the head reads, where it reads several but not all."""
    for node in _below([rewrite.stream_end], set()):
        if node.target is not aten.slice.Tensor or len(node.args) < 3:
            continue
        source, dim, start = node.args[:3]
        axes = rewrite.sizes.axes(source) if isinstance(source, Node) else None
        if len(axes or ()) == 4 and dim in (2, -2):
            continue  # keys or values, of which a window is cached
        if axes and isinstance(dim, int) and axes[dim].is_sequence and isinstance(start, int) and start < -1:
            return -start
    return None


def is_drafted(rewrite: Rewrite) -> bool:
    """Whether a call is asked for several tokens' logits and a cache."""
    if rewrite.mode != "gather" or not _tokens_read(rewrite):
        return False
    return any(is_cached(n, rewrite) for n in rewrite.output.all_input_nodes if rewrite.level.get(n))


@dataclass(frozen=True)
class EmptySlots(Pass):
    """Zeros in the slots of returned keys and values where a row kept no token; `prunepass.generation` finds them."""

    name = "cached"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for node in state.outputs:
            if node in state.cached and node not in state.results():
                yield Fault("A key-value cache is not returned any more.", node)

    def run(self, state: Rewrite) -> int:
        """Returns how many outputs have such slots."""
        output = next(iter(state.graph.find_nodes(op="output")))
        count = 0
        for node in list(output.all_input_nodes):
            if node not in state.cached:
                continue
            site = state.sites[state.level[node] - 1]
            assert site.kept is not None
            if site.kept.alive is None:
                continue

            def build(x: Tensor, alive: Tensor) -> Tensor:
                return torch.where(alive[:, None, :, None], x, torch.zeros_like(x))

            operands = [
                state.operand(node, length="K"),
                state.operand(site.kept.alive, "B", "K", dtype=torch.bool),
            ]
            with state.graph.inserting_before(output):
                made = state.inline(build, operands, stage=site.index, role=self.name, key=self.name)
            output.replace_input_with(node, made)
            count += 1
        return count

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for old, new in zip(state.outputs, state.results(), strict=True):
            if old not in state.cached:
                continue
            kept = state.sites[state.level[old] - 1].kept
            alive = None if kept is None else kept.alive
            if alive is not None and not (is_ours(new) and new.meta["prunepass"]["pass"] == self.name):
                yield Fault("Slots of a key-value cache that hold no token are not empty.", new)
            elif alive is not None and not reads_made(new, alive, self.name):
                yield Fault(f"Slots of a key-value cache are not emptied by {alive}, of its own layer.", new)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return result_faults(state)


def reads_made(node: Node, wanted: Node, role: str) -> bool:
    """Whether a value that the pass ``role`` made reads ``wanted``."""
    todo = [node]
    while todo:
        at = todo.pop()
        if at is wanted:
            return True
        if is_ours(at) and at.meta["prunepass"]["pass"] == role:
            todo += at.all_input_nodes
    return False
