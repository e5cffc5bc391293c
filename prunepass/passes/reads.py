"""Whether a model's head reads protected tokens only: a pooled [CLS], the last token's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from prunepass.graph.ops import int_argument, is_attention, mixes_tokens
from prunepass.graph.sizes import Sizes

if TYPE_CHECKING:
    from prunepass.passes.state import Rewrite

__all__ = ["reads_protected_only"]

aten = torch.ops.aten


def reads_protected_only(rewrite: Rewrite) -> bool:
    """Follow the stream's end through the head. True when each path to an output goes through a read of a position that
    the plan protects, so that the read finds its token at the same end of the gathered sequence and nothing has to be
    restored. Notes those reads.

    A position counts from the end of the row that padding is not on: ``x[:, 0]`` reads the first live token where
    padding stands on the right, ``x[:, -1]`` the last where it stands on the left, as such heads expect.
    """
    protect, sizes = rewrite.plan.protect, rewrite.sizes
    reads: set[str] = set()
    todo, seen = [rewrite.stream_end], {rewrite.stream_end}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user.op == "output":
                return False
            if _picks(user, node, protect.first, protect.always_last, sizes):
                reads.add(user.name)
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
    to_the_end = end is None or (isinstance(end, int) and end >= 2**31)
    if start < 0:
        return to_the_end and -last <= start
    return isinstance(end, int) and start >= 0 and 0 < end <= first
