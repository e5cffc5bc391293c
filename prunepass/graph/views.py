"""Views: whether the elements of each token stay together where axes are split, merged and moved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from prunepass.graph.kinds import name_of
from prunepass.graph.picks import axes_of
from prunepass.graph.sizes import Probe, Sizes

__all__ = ["VIEWS", "view"]

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}


def view(node: Node, sizes: Sizes) -> str | None:
    """A view may split and merge axes around the sequence, but each token's elements must stay together.

    The sequence of an axis with ``inner`` elements to its right is the digit [inner, inner * size) of an element's
    place in memory order. ``[B, S, D] -> [B, D, S]`` moves it; ``[B, S, D] -> [B * S, H, d]`` does not.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    for probe in (sizes.first, sizes.second):
        before, after = (_digits(n, probe.values[n].shape, sizes) for n in (source, node))
        if len(before) != len(after) or not all(itertools.starmap(_nested, zip(before, after, strict=True))):
            return f"{name_of(node)} puts elements of different tokens side by side"
        for (low, high), (inner, outer) in zip(before, after, strict=True):
            split = outer // inner == probe.length != high // low
            if split and _merged_at(source, sizes, probe) not in (None, inner // low):
                return f"{name_of(node)} takes the sequence apart in another order than it was put together"
    return None


def _digits(node: Node, shape: Sequence[int], sizes: Sizes) -> list[tuple[int, int]]:
    """(inner, inner * size) of each axis that follows the length."""
    found = []
    for i, axis in enumerate(axes_of(sizes, node)):
        if axis.follows_length:
            inner = math.prod(shape[i + 1 :])
            found.append((inner, inner * shape[i]))
    return found


def _nested(one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Whether one of two digits lies in the other."""
    (a, b), (c, d) = one, two
    return (c % a == 0 and b % d == 0) or (a % c == 0 and d % b == 0)


def _merged_at(node: Node, sizes: Sizes, probe: Probe) -> int | None:
    """How many elements of an axis of merged sizes, the sequence and others, lie between two tokens in a row; None
    where the graph does not show how it was merged."""
    seen, todo = {node}, [node]
    while todo:
        value = todo.pop()
        for a in value.all_input_nodes:
            if a in seen or not any(axis.follows_length for axis in axes_of(sizes, a)):
                continue
            if value.target in VIEWS and sizes.sequence_axes(a):
                (low, _), (inner, _) = (_digits(n, probe.values[n].shape, sizes)[0] for n in (a, value))
                return low // inner
            seen.add(a)
            todo.append(a)
    return None
