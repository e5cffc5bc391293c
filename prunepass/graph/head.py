"""What a model's head makes of the residual stream's end: each token's state as it is, a pool of them, single ones."""

from __future__ import annotations

from collections.abc import Container
from enum import Enum, auto
from typing import Any

import torch
from torch.fx import Graph, Node

from prunepass.graph.ops import mixes_tokens
from prunepass.graph.sizes import Sizes

__all__ = ["Reading", "behind_norms", "leaving", "readings"]

aten = torch.ops.aten

#: token-wise, but of no norm: a head begins with them
_NO_NORM = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
}
_PICKS = {aten.select.int, aten.slice.Tensor}
_POOLS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.max.dim}


class Reading(Enum):
    """One way in which a head reads the stream's end."""

    STATES = auto()  # an output holds each token's hidden state
    POOL = auto()  # a sum, mean or maximum over the tokens
    EACH = auto()  # a product with weights for each token: logits
    FIRST = auto()  # tokens counted from the row's start
    LAST = auto()  # tokens counted from the row's end
    OTHER = auto()  # something else that looks at several tokens


def behind_norms(graph: Graph, end: Node, sizes: Sizes) -> set[Node]:
    """``end``, and the nodes of final norms: token by token, of ``end`` and constants only."""
    return _token_wise(graph, end, sizes, alone=True)


def readings(graph: Graph, end: Node, sizes: Sizes) -> frozenset[Reading]:
    """How the head reads ``end``, the residual stream after the last block. Empty where nothing does."""
    inside = _token_wise(graph, end, sizes, alone=False)
    users = {user for node in inside for user in leaving(node, inside)}
    return frozenset(_reading(user, sizes) for user in users if "prunepass" not in user.meta)


def leaving(node: Node, inside: Container[Node]) -> list[Node]:
    """The users of ``node`` that are not ``inside``; without those that check it or ask for its sizes only."""
    others = [user for user in node.users if user not in inside]
    return [u for u in others if u.op == "output" or (u.users and u.target is not aten.sym_size.int)]


def _token_wise(graph: Graph, end: Node, sizes: Sizes, *, alone: bool) -> set[Node]:
    """Nodes that carry ``end`` to where a head begins.

    Args:
        alone: whether to stop where another value of the tokens comes in, such as the mask in front of a pool.
    """
    inside = {end}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in _NO_NORM or "prunepass" in node.meta:
            continue
        if not any(a in inside for a in node.all_input_nodes):
            continue
        if alone and any(a not in inside and sizes.follows_length(a) for a in node.all_input_nodes):
            continue
        if sizes.follows_length(node) and mixes_tokens(node, sizes) is None:
            inside.add(node)
    return inside


def _reading(user: Node, sizes: Sizes) -> Reading:
    if user.op == "output":
        return Reading.STATES
    if mixes_tokens(user, sizes) is None:
        return Reading.EACH
    if user.target in _POOLS:
        return Reading.POOL
    if user.target not in _PICKS:
        return Reading.OTHER
    start: Any = user.args[2] if len(user.args) > 2 else 0
    if not isinstance(start, int):
        return Reading.OTHER
    return Reading.LAST if start < 0 else Reading.FIRST
