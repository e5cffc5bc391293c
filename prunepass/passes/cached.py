"""Key-value caches: a pruned layer's keys and values leave the graph at the length it ran at.

During generation the first call runs on the prompt and returns every layer's keys and values; each later call appends
one token to them. A pruned layer's cache holds the tokens it kept, and a new token attends to those: what was pruned is
gone for good, as SDTP has it. Nothing else changes in later calls, where there is one token and nothing to prune.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from prunepass.errors import RefusalError
from prunepass.graph.ops import is_attention

if TYPE_CHECKING:
    from prunepass.passes.state import Rewrite

__all__ = ["is_cached", "refuse_generation"]


def is_cached(node: Node, rewrite: Rewrite) -> bool:
    """Whether an output is what its block's attention reads as keys or values: [B, ..., S, ...], and not a window of
    it, which would count tokens where it means positions."""
    sizes = rewrite.sizes
    stream = {n for block in rewrite.blocks for n in (block.start, block.after_attention, block.end)}
    axes = sizes.axes(node) or ()
    follow = [axis for axis in axes if axis.follows_length]
    if len(axes) < 3 or len(follow) != 1 or not follow[0].is_sequence:
        return False
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if is_attention(user, sizes):
                return True
            if user not in seen and user not in stream:
                seen.add(user)
                todo.append(user)
    return False


def refuse_generation(rewrite: Rewrite) -> None:
    """Raises `RefusalError` where shortened caches would silently give wrong continuations."""
    plan, first = rewrite.plan, rewrite.sites[0]
    if first.cut is rewrite.blocks[0].start:
        raise RefusalError(
            "the model returns its key-value cache and the plan has a stage before block 0. Positions of new tokens "
            "are counted by the first layer's cache, which must hold the whole prompt.",
            hint="Place the first stage at layer 1 or later.",
        )
    if not plan.protect.last and not plan.protect.last_share:
        raise RefusalError(
            "the model returns its key-value cache, so the next token is predicted from the prompt's last one, which "
            "the plan does not protect.",
            hint='Give the plan Protect(last=1); as an option: "protect": {"first": 4, "last": 1}.',
        )
    if rewrite.inputs.attention_mask is not None:
        raise RefusalError(
            "the model returns its key-value cache and takes an attention mask. Rows of different lengths keep "
            "different numbers of tokens, and no mask of a later call could tell which slots of the cache are empty.",
            where="attention_mask",
            hint="Generate for one prompt at a time, or for prompts of equal length without a mask; call the model "
            "with use_cache=False where no cache is needed.",
        )
