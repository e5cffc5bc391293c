"""Reads of single tokens: whether a model's head reads protected ones only (a pooled [CLS], the last token's logits),
and where any are read in a graph in which nothing is pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from prunepass.errors import RefusalError
from prunepass.graph.modules import module_path
from prunepass.graph.ops import int_argument, is_attention, mixes_tokens
from prunepass.graph.sizes import Sizes
from prunepass.passes.cached import is_cached
from prunepass.passes.edges import TO_THE_END, Slots, sequence_axis
from prunepass.passes.state import Rewrite
from prunepass.passes.windows import cut_to_window

__all__ = ["place_of", "reads_by_place", "reads_protected_only", "refuse_early_end"]

aten = torch.ops.aten
#: a slice that ends there or behind it takes all that is left
_NO_END = 2**31


def reads_protected_only(rewrite: Rewrite) -> bool:
    """Follow the stream's end through the head. True when each path to an output goes through a read of a position that
    the plan protects, so that the read finds its token at the same end of the gathered sequence and nothing has to be
    restored. Notes those reads.

    A position counts from the end of the row that padding is not on: ``x[:, 0]`` reads the first live token where
    padding stands on the right, ``x[:, -1]`` the last where it stands on the left, as such heads expect.

    Some models read them before their last layers, which take keys and values of an earlier one. The stream then ends
    before that layer, and what comes after is followed through its attention and those of the layers above.
    """
    protect, sizes = rewrite.plan.protect, rewrite.sizes
    own = {a for block in rewrite.blocks for a in block.attentions}
    windows = {cut for result in rewrite.output.all_input_nodes for cut in cut_to_window(result) or ()}
    reads: set[str] = set()
    todo, seen = [rewrite.stream_end], {rewrite.stream_end}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "output" and is_cached(node, rewrite):
                continue
            if user.op == "output":
                return False
            if user in windows:
                continue  # a cache, which lies beside the stream
            if _picks(user, node, protect.first, protect.always_last, sizes):
                reads.add(user.name)
            elif user in own:
                todo += [user] if sizes.follows_length(user) else []  # else its queries are tokens that were read
            elif is_attention(user, sizes) or mixes_tokens(user, sizes) is not None:
                return False
            elif sizes.follows_length(user):
                todo.append(user)
    rewrite.protected_reads = frozenset(reads)
    return True


def _picks(user: Node, source: Node, first: int, last: int, sizes: Sizes) -> bool:
    """``x[:, i]`` or ``x[:, -n:]`` along the sequence, with all the positions protected."""
    if user.target not in (aten.select.int, aten.slice.Tensor) or user.args[0] is not source:
        return False
    axes = sizes.axes(source) or ()
    dim = int_argument(user, 1) % len(axes) if len(user.args) > 1 else 0
    if not axes[dim].is_sequence:
        return False
    start: Any = user.args[2] if len(user.args) > 2 else 0
    start = 0 if start is None else start
    if not isinstance(start, int):
        return False
    if user.target is aten.select.int:
        return 0 <= start < first or -last <= start < 0
    if len(user.args) > 4 and user.args[4] != 1:
        return False
    end: Any = user.args[3] if len(user.args) > 3 else None
    to_the_end = end is None or (isinstance(end, int) and end >= _NO_END)
    if start < 0:
        return to_the_end and -last <= start
    return isinstance(end, int) and start >= 0 and 0 < end <= first


def refuse_early_end(rewrite: Rewrite) -> None:
    """Raises `RefusalError` where the stream ends before the last attention over it, and not by reads of protected
    tokens alone: there is no place at which the others could be put back."""
    last = rewrite.blocks[-1]
    late = [a for a in last.attentions if a > last.end]
    if not late or rewrite.reads_protected:
        return
    raise RefusalError(
        "the model leaves tokens out of its own accord before its last layers, which attend to keys of an earlier one, "
        "and what they read there is not known to be protected tokens alone.",
        where=module_path(late[-1]) or late[-1].name,
        hint='Protect the last token, Protect(last=1), and load the model with attn_implementation="sdpa".',
    )


def place_of(read: Node) -> Slots | None:
    """Where a select or a slice takes its tokens from; None where that is no number of slots at one end."""
    start: Any = read.args[2] if len(read.args) > 2 else 0
    start = 0 if start is None else start
    if not isinstance(start, int):
        return None
    if read.target is aten.select.int:
        return Slots(start, start + 1 if start != -1 else TO_THE_END, 1)
    if len(read.args) > 4 and read.args[4] != 1:
        return None
    end: Any = read.args[3] if len(read.args) > 3 else None
    if start < 0:
        return Slots(start, TO_THE_END, -start) if end is None or (isinstance(end, int) and end >= _NO_END) else None
    return Slots(start, end, end - start) if isinstance(end, int) and start < end < _NO_END else None


def reads_by_place(rewrite: Rewrite) -> dict[Slots, list[Node]]:
    """All nodes that take tokens from a place that is known, along the one axis of tokens that their source has."""
    found: dict[Slots, list[Node]] = {}
    for node in rewrite.graph.nodes:
        source: Any = node.args[0] if node.target in (aten.select.int, aten.slice.Tensor) else None
        axis = sequence_axis(rewrite, source) if isinstance(source, Node) else None
        if axis is None:
            continue
        dim = int_argument(node, 1) if len(node.args) > 1 else 0
        place = place_of(node) if dim % len(rewrite.sizes.axes(source) or ()) == axis else None
        if place is not None:
            found.setdefault(place, []).append(node)
    return found
