"""Cuts and blocks, found by dominators: no line here knows an architecture.

In the data flow from the token embeddings to the output, the residual stream is the chain of values that every path
goes through: the immediate dominators of the output, walked back to the embeddings. A *block* is a stretch of that
chain that mixes tokens (holds an attention), with the token-wise stretch that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.inputs import WHOLE_MODEL, ModelInputs
from prunepass.graph.modules import layer_path, module_path
from prunepass.graph.ops import is_attention
from prunepass.graph.sizes import Sizes

__all__ = ["Block", "find_blocks"]


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: 0-based.
        path: module path such as ``encoder.layer.3``; "" where the graph does not say.
        start: the cut before it: the value of the residual stream that its attention reads.
        after_attention: the value of the stream after its attention; the next block's start where attention and
            feed-forward run in parallel.
        end: the value of the stream after it; ``start`` of the next block.
        attentions: its attention nodes: fused ones, or softmaxes over the keys.
    """

    index: int
    path: str
    start: Node
    after_attention: Node
    end: Node
    attentions: tuple[Node, ...]

    @property
    def parallel(self) -> bool:
        """Whether attention and feed-forward part cannot be told apart along the stream."""
        return self.after_attention is self.end


def find_blocks(gm: GraphModule, inputs: ModelInputs, sizes: Sizes) -> tuple[Block, ...]:
    """The blocks of a model, in order.

    Raises:
        RefusalError: no attention, or no residual stream that can be cut.
    """
    graph = _data_flow(gm, inputs.source, sizes)
    if graph is None:
        raise RefusalError(
            "no output depends on the token embeddings, so there is nothing to prune.",
            hint=WHOLE_MODEL,
        )
    flow, sink = graph
    attentions = [n for n in gm.graph.nodes if n in flow and is_attention(n, sizes)]
    if not attentions:
        raise RefusalError(
            "no attention was found between the token embeddings and the output.",
            hint="prunepass prunes models with scaled dot-product attention, fused or as a softmax over the keys. "
            + WHOLE_MODEL,
        )
    idom = nx.immediate_dominators(flow, inputs.source)
    chain = [sink]
    while chain[-1] is not inputs.source:
        chain.append(idom[chain[-1]])
    chain.reverse()
    place = _places(flow, idom, chain)
    mixing: dict[int, list[Node]] = {}
    for attention in attentions:
        mixing.setdefault(place[attention], []).append(attention)
    return _assemble(chain, mixing, sizes)


def _data_flow(gm: GraphModule, source: Node, sizes: Sizes) -> tuple[nx.DiGraph, Node] | None:
    """The graph between the embeddings and the output that most of the model leads to. Sizes carry no content."""
    reached = {source}
    for node in gm.graph.nodes:
        if sizes.number(node) is None and any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    output = next(iter(gm.graph.find_nodes(op="output")))
    sinks = [n for n in output.all_input_nodes if n in reached]
    if not sinks:
        return None
    sink = max(sinks, key=lambda n: _depth(n, reached))  # the first of those that most of the model leads to
    flow = nx.DiGraph()
    flow.add_node(source)
    todo, seen = [sink], {sink}
    while todo:
        node = todo.pop()
        for a in node.all_input_nodes if node is not source else ():
            if a not in reached:
                continue
            flow.add_edge(a, node)
            if a not in seen:
                seen.add(a)
                todo.append(a)
    return flow, sink


def _depth(node: Node, reached: set[Node]) -> int:
    """How many values between the embeddings and ``node`` it depends on."""
    seen, todo = {node}, [node]
    while todo:
        for a in todo.pop().all_input_nodes:
            if a in reached and a not in seen:
                seen.add(a)
                todo.append(a)
    return len(seen)


def _places(flow: nx.DiGraph, idom: dict[Node, Node], chain: Sequence[Node]) -> dict[Node, int]:
    """For each node the index of the chain's last value that it depends on (a chain node counts to its predecessor)."""
    own = {node: i for i, node in enumerate(chain)}
    place: dict[Node, int] = {}
    for node in nx.topological_sort(flow):
        if node is chain[0]:
            place[node] = 0
            continue
        above = idom[node]
        place[node] = own.get(above, place[above])
    return place


def _assemble(chain: Sequence[Node], mixing: dict[int, list[Node]], sizes: Sizes) -> tuple[Block, ...]:
    order = sorted(mixing)
    starts = []
    for i in order:
        at = next((j for j in range(i, -1, -1) if _is_stream(chain[j], sizes)), None)
        if at is None:
            raise RefusalError(
                "the value before this attention has no separate batch and sequence axes, so it cannot be cut.",
                where=_path(mixing[i]),
            )
        starts.append(at)
    limits = [*starts[1:], len(chain) - 1]
    after = [_settled(chain, i + 1, limit, sizes) for i, limit in zip(order, limits, strict=True)]
    ends = [*starts[1:], _last_end(chain, starts, after, sizes)]
    return tuple(
        Block(n, _path(mixing[i]), chain[starts[n]], chain[min(after[n], ends[n])], chain[ends[n]], tuple(mixing[i]))
        for n, i in enumerate(order)
    )


def _path(attentions: Sequence[Node]) -> str:
    return layer_path(module_path(attentions[0]))


def _is_stream(node: Node, sizes: Sizes) -> bool:
    """A hidden state: a floating [B, S, D], with exactly one sequence axis and, for more than one row, a batch axis."""
    value = sizes.first.values[node]
    axes = sizes.axes(node)
    if axes is None or not value.dtype.is_floating_point or len(axes) < 3:
        return False
    length_axes = [a for a in axes if a.follows_length]
    has_rows = sizes.one_row or sizes.batch_axis(node) is not None
    return has_rows and len(length_axes) == 1 and length_axes[0].is_sequence


def _settled(chain: Sequence[Node], first: int, last: int, sizes: Sizes) -> int:
    """The stream after an attention: past what follows in a line (a norm, a cast), up to where it branches again."""
    at = next((j for j in range(first, last + 1) if _is_stream(chain[j], sizes)), last)
    while at < last and len(_consumers(chain[at])) == 1 and _is_stream(chain[at + 1], sizes) and _direct(chain, at):
        at += 1
    return at


def _consumers(node: Node) -> list[Node]:
    return [u for u in node.users if u.op != "output"]


def _direct(chain: Sequence[Node], i: int) -> bool:
    return chain[i] in chain[i + 1].all_input_nodes


def _last_end(chain: Sequence[Node], starts: Sequence[int], after: Sequence[int], sizes: Sizes) -> int:
    """Where the last block ends and the head begins.

    Nothing mixes tokens after it, so it is recognised by its likeness to the block before: the same operators along the
    chain. A model of one block is told by its module path, else by the last value of the stream's shape.
    """
    if len(starts) > 1:
        pattern = [chain[j].target for j in range(after[-2] + 1, starts[-1] + 1)]
        following = [chain[j].target for j in range(after[-1] + 1, len(chain))]
        same = 0
        while same < min(len(pattern), len(following)) and pattern[same] == following[same]:
            same += 1
        end = after[-1] + same
    else:
        path = layer_path(module_path(chain[after[-1]]))
        inside = [j for j in range(after[-1], len(chain)) if path and layer_path(module_path(chain[j])) == path]
        shape = _shape(chain[starts[0]], sizes)
        alike = [j for j in range(after[-1], len(chain)) if _shape(chain[j], sizes) == shape]
        end = (inside or alike or [after[-1]])[-1]
    return next(j for j in range(end, -1, -1) if _is_stream(chain[j], sizes))


def _shape(node: Node, sizes: Sizes) -> torch.Size | None:
    value = sizes.first.values[node]
    return value.shape if isinstance(value, torch.Tensor) else None
