"""Mixtures of experts for runtimes that know no products with weights chosen by token."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.experts import EXPERT_LINEAR

__all__ = ["expert_by_expert", "spell_out_experts"]


def spell_out_experts(gm: GraphModule) -> GraphModule:
    """``expert_linear(x, weight, bias, experts)`` -> `expert_by_expert`, for a graph that is traced next.

    Returns:
        ``gm`` itself where it has none, else a copy over the same parameters.
    """
    if not gm.graph.find_nodes(op="call_function", target=EXPERT_LINEAR):
        return gm
    copy, _ = copy_with_nodes(gm)
    for node in copy.graph.find_nodes(op="call_function", target=EXPERT_LINEAR):
        node.target = expert_by_expert
    copy.recompile()
    return copy


def expert_by_expert(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, transposed: bool) -> Tensor:
    """`prunepass.graph.experts` in one plain product an expert, of the rows that chose it and no others."""
    tokens, k = experts.shape
    rows = (x[:, None].expand(tokens, k, x.shape[-1]) if x.dim() == 2 else x).flatten(0, 1).to(weight.dtype)
    ids = experts.reshape(-1)
    width = weight.shape[2] if transposed else weight.shape[1]
    out = rows.new_zeros(rows.shape[0], width)
    for e in range(weight.shape[0]):
        chosen = (ids == e).nonzero().squeeze(1)
        product = rows.index_select(0, chosen) @ (weight[e] if transposed else weight[e].T)
        out = out.index_put((chosen,), product if bias is None else product + bias[e])
    spelled: Tensor = out.unflatten(0, (tokens, k))
    return spelled
