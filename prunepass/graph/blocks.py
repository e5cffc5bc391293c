"""Cuts and blocks, found by dominators: no line here knows an architecture.

In the data flow from the token embeddings to the output, the residual stream is the chain of values that every path
goes through: the immediate dominators of the output, walked back to the embeddings. A *block* is a stretch of that
chain that mixes tokens (holds an attention), with the token-wise stretch that follows it. The stream ends before its
tokens are read by others: a decoder whose queries come from tokens of its own holds no block of this stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.ends import is_stream, last_end, settled
from prunepass.graph.flow import Depths
from prunepass.graph.inputs import WHOLE_MODEL, ModelInputs
from prunepass.graph.modules import layer_path, module_path
from prunepass.graph.ops import is_attention, reads_own_tokens
from prunepass.graph.reasons import no_attention
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
        stream: the values of the residual stream from ``start`` to ``end``, both included.
    """

    index: int
    path: str
    start: Node
    after_attention: Node
    end: Node
    attentions: tuple[Node, ...]
    stream: tuple[Node, ...]

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
        raise no_attention(flow, list(gm.graph.nodes), sizes)
    idom = nx.immediate_dominators(flow, inputs.source)
    chain = [sink]
    while chain[-1] is not inputs.source:
        chain.append(idom[chain[-1]])
    chain.reverse()
    place = _places(flow, idom, chain)
    mixing: dict[int, list[Node]] = {}
    for attention in attentions:
        mixing.setdefault(place[attention], []).append(attention)
    mixing = _of_stream(flow, mixing)
    if not mixing:
        raise RefusalError(
            "the tokens are only read as the memory of another attention, so there is no block to prune in.",
            where=module_path(attentions[0]) or attentions[0].name,
            hint="prunepass prunes encoders and decoders with self-attention.",
        )
    return _assemble(chain, mixing, sizes)


def _of_stream(flow: nx.DiGraph, mixing: dict[int, list[Node]]) -> dict[int, list[Node]]:
    """The stretches in which the stream's tokens attend to one another, up to the first one in which others read them.

    In a decoder's cross-attention the keys depend on the stream, and the queries on other tokens.
    """
    own: dict[int, list[Node]] = {}
    for place in sorted(mixing):
        first = mixing[place][0]  # in the graph's order: no other attention of the stretch stands before it
        if not reads_own_tokens(first, flow):
            break
        own[place] = mixing[place]
    return own


def _data_flow(gm: GraphModule, source: Node, sizes: Sizes) -> tuple[nx.DiGraph, Node] | None:
    """The graph between the embeddings and the output that most of the model leads to. Sizes carry no content, and what
    is made of the embeddings for later layers alone lies beside the stream."""
    reached = {source}
    for node in gm.graph.nodes:
        if sizes.number(node) is None and any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    output = next(iter(gm.graph.find_nodes(op="output")))
    sinks = [n for n in output.all_input_nodes if n in reached]
    if not sinks:
        return None
    depths = Depths(gm.graph, source, sizes)
    sink = max(sinks, key=lambda n: _depth(n, reached))  # the first of those that most of the model leads to
    flow = nx.DiGraph()
    flow.add_node(source)
    todo, seen = [sink], {sink}
    while todo:
        node = todo.pop()
        for a in node.all_input_nodes if node is not source else ():
            if a not in reached or depths.is_beside(a, node):
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
        at = next((j for j in range(i, -1, -1) if is_stream(chain[j], sizes)), None)
        if at is None:
            raise RefusalError(
                "the value before this attention has no separate batch and sequence axes, so it cannot be cut.",
                where=_path(mixing[i]),
            )
        starts.append(at)
    path = _path(mixing[order[-1]])
    ends = [*starts[1:], last_end(chain, starts, order[-1], path, sizes)]
    after = [settled(chain, i + 1, end, sizes) for i, end in zip(order, ends, strict=True)]
    return tuple(
        Block(
            index=n,
            path=_path(mixing[i]),
            start=chain[starts[n]],
            after_attention=chain[after[n]],
            end=chain[ends[n]],
            attentions=tuple(mixing[i]),
            stream=tuple(chain[j] for j in range(starts[n], ends[n] + 1) if is_stream(chain[j], sizes)),
        )
        for n, i in enumerate(order)
    )


def _path(attentions: Sequence[Node]) -> str:
    return layer_path(module_path(attentions[0]))
