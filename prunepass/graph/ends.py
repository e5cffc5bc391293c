"""Where along the residual stream an attention's result is settled, and where the last block ends.

Nothing mixes tokens after the last block, so that nothing but the stream itself says where the head (a final norm, a
pooler, a language-model head) begins. It matters for pruned tokens: each rests at the state it left with, and the head
works on that state. A final norm counted to the last block would leave it out for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.fx import Node

from prunepass.graph.modules import layer_path, module_path
from prunepass.graph.ops import is_pointwise
from prunepass.graph.sizes import Sizes

__all__ = ["is_stream", "last_end", "settled"]

aten = torch.ops.aten
_ADDS = {aten.add.Tensor, aten.sub.Tensor}


def is_stream(node: Node, sizes: Sizes) -> bool:
    """A hidden state: a floating [B, S, D], with exactly one sequence axis and, for more than one row, a batch axis."""
    value = sizes.first.values[node]
    axes = sizes.axes(node)
    if axes is None or not value.dtype.is_floating_point or len(axes) < 3:
        return False
    length_axes = [a for a in axes if a.follows_length]
    has_rows = sizes.one_row or sizes.batch_axis(node) is not None
    return has_rows and len(length_axes) == 1 and length_axes[0].is_sequence


def settled(chain: Sequence[Node], first: int, last: int, sizes: Sizes) -> int:
    """The stream after an attention: past what follows in a line (a norm, a cast), up to where it branches again, and
    not past ``last``, the block's end."""
    at = next((j for j in range(first, last + 1) if is_stream(chain[j], sizes)), last)
    while at < last and _goes_on_in_line(chain, at) and is_stream(chain[at + 1], sizes):
        at += 1
    return at


def last_end(chain: Sequence[Node], starts: Sequence[int], place: int, path: str, sizes: Sizes) -> int:
    """The place of the last block's end on the chain.

    The block is like one before it: from its start the chain repeats the operators and shapes of that one. Where there
    is none alike, the end is the last value that adds onto the stream, with what follows the attention's own sum in a
    line (the norm of a post-norm block). The only block of a model also ends with the module that it stands in.

    Args:
        chain: the dominators from the embeddings to the output.
        starts: places of all blocks' starts.
        place: of the last value that the last block's attention depends on.
        path: module path of the last block.
    """
    for start, following in reversed(list(itertools.pairwise(starts))):
        steps = following - start
        if all(_alike(chain, start + k, starts[-1] + k, sizes) for k in range(1, steps + 1)):
            return starts[-1] + steps
    hidden = _shape(chain[starts[-1]], sizes)
    states = [
        j for j in range(place + 1, len(chain)) if is_stream(chain[j], sizes) and _shape(chain[j], sizes) == hidden
    ]
    if len(starts) == 1 and any(part.isdigit() for part in path.split(".")):
        inside = [j for j in states if layer_path(module_path(chain[j])) == path]
        if inside:
            return inside[-1]
    return _after_last_sum(chain, states, place)


def _after_last_sum(chain: Sequence[Node], states: Sequence[int], place: int) -> int:
    """Of ``states``, places of values of the stream's shape, the last sum onto the stream and the line behind it."""
    if not states:
        return place
    sums = [j for j in states if _adds_to_stream(chain, j)]
    if not sums:
        return states[0]
    end = sums[-1]
    line = _line(chain, sums[0]) if len(sums) > 1 else ()
    for target in line:
        if end + 1 not in states or chain[end + 1].target != target or not _goes_on_in_line(chain, end):
            break
        end += 1
    return end


def _line(chain: Sequence[Node], at: int) -> list[object]:
    """The operators that follow a value in a line, up to where the stream branches again."""
    targets: list[object] = []
    while at + 1 < len(chain) and _goes_on_in_line(chain, at):
        at += 1
        targets.append(chain[at].target)
    return targets


def _adds_to_stream(chain: Sequence[Node], at: int) -> bool:
    """``x + f(x)``: a sum that takes the stream itself, scaled or cast at most, as one of its terms."""
    node, before = chain[at], chain[at - 1]
    if node.target not in _ADDS or len(node.all_input_nodes) < 2:
        return False
    return any(_is_same_but_scaled(term, before) for term in node.all_input_nodes)


def _is_same_but_scaled(node: Node, source: Node) -> bool:
    while node is not source:
        tensors = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if len(tensors) != 1 or not is_pointwise(node):
            return False
        node = tensors[0]
    return True


def _goes_on_in_line(chain: Sequence[Node], at: int) -> bool:
    """Whether the next value of the chain is the only one that reads this one."""
    consumers = [u for u in chain[at].users if u.op != "output"]
    return at + 1 < len(chain) and consumers == [chain[at + 1]]


def _alike(chain: Sequence[Node], one: int, two: int, sizes: Sizes) -> bool:
    if two >= len(chain) or chain[one].target != chain[two].target:
        return False
    return _shape(chain[one], sizes) == _shape(chain[two], sizes)


def _shape(node: Node, sizes: Sizes) -> torch.Size | None:
    value = sizes.first.values[node]
    return value.shape if isinstance(value, torch.Tensor) else None
