"""Queries that see no key. PyTorch's attention gives zeros for them; OpenVINO's divides zero by zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from prunepass.graph.masks import put
from prunepass.graph.ops import SDPA, attention_arguments

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["zero_where_nothing_is_seen"]

aten = torch.ops.aten


def zero_where_nothing_is_seen(program: ExportedProgram) -> int:
    """``attention(q, k, v, mask)`` -> ``where(mask.any(-1), attention(q, k, v, mask), 0)``, in place. Exact.

    Which queries see something is found once for each mask. The selection becomes part of the plugin's own attention
    kernel. Padding on the left leaves such queries under a causal mask, padding wider than the window under that of
    sliding attention, and a row without any token everywhere.

    Returns:
        How many attentions changed: those with a mask.
    """
    seeing: dict[Node, Node] = {}
    attentions = program.graph.find_nodes(op="call_function", target=SDPA)
    masked = [
        (node, mask) for node in attentions if isinstance(mask := attention_arguments(node).get("attn_mask"), Node)
    ]
    for node, mask in masked:
        if mask not in seeing:
            seeing[mask] = _sees_any(node, mask)
        _select(node, seeing[mask])
    program.graph_module.recompile()
    return len(masked)


def _sees_any(before: Node, mask: Node) -> Node:
    """[..., L, 1] bool: whether a query sees a key. An added mask hides with minus infinity alone: the lowest number of
    a type still leaves all keys their share."""
    if mask.meta["val"].dtype != torch.bool:
        # not by its largest: that of minus infinities alone is a finite number there
        mask = put(before, mask.meta["val"] > -torch.inf, aten.gt.Scalar, mask, -torch.inf)
    return put(before, mask.meta["val"].any(-1, keepdim=True), aten.any.dim, mask, -1, True)


def _select(node: Node, sees: Node) -> None:
    value = node.meta["val"]
    readers: list[Any] = list(node.users)
    after = node.next
    zero = put(after, value.new_zeros(()), aten.full.default, [], 0.0)
    zero.kwargs = {"dtype": value.dtype}
    chosen = put(after, value, aten.where.self, sees, node, zero)
    for reader in readers:
        reader.replace_input_with(node, chosen)
