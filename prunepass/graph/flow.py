"""What values depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

__all__ = ["ancestors"]


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
