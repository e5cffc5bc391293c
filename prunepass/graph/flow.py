"""What values depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from prunepass.graph.ops import is_attention
from prunepass.graph.sizes import Sizes

__all__ = ["Depths", "ancestors"]


def ancestors(nodes: Node | Iterable[Node]) -> set[Node]:
    """All that some nodes depend on, and themselves."""
    seen = {nodes} if isinstance(nodes, Node) else set(nodes)
    todo = list(seen)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


class Depths:
    """How many attentions stand one after the other between the tokens and each value of their content.

    Args:
        source: the tokens' embeddings.
    """

    def __init__(self, graph: Graph, source: Node, sizes: Sizes) -> None:
        self._depth = {source: 0}
        for node in graph.nodes:
            if node is source or sizes.number(node) is not None:
                continue  # sizes carry no content
            above = [self._depth[a] for a in node.all_input_nodes if a in self._depth]
            if above:
                self._depth[node] = max(above) + is_attention(node, sizes)

    def is_beside(self, value: Node, reader: Node) -> bool:
        """Whether ``value`` is made of the embeddings alone and read behind the first layer's attention: an embedding
        for each layer, say. It is no part of the stream, and can be taken at any tokens, as a table of positions."""
        return self._depth.get(value, 1) == 0 and self._depth.get(reader, 0) > 1
