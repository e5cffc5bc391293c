"""Our own operators in ATen's, for what runs without us: runtimes, and programs that are loaded with torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.experts import EXPERT_LINEAR
from prunepass.graph.sinks import SOFTMAX_WITH_SINKS, softmax_with_sinks

__all__ = ["expert_by_expert", "spelled_out"]


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


_FORMS: dict[Any, Callable[..., Tensor]] = {
    EXPERT_LINEAR: expert_by_expert,
    SOFTMAX_WITH_SINKS: softmax_with_sinks,
}


def spelled_out(gm: GraphModule) -> GraphModule:
    """``expert_linear(x, weight, ...)`` -> `expert_by_expert`, and so on, for a graph that is traced next.

    Returns:
        ``gm`` itself where it has none of our operators, else a copy over the same parameters.
    """
    if not any(node.target in _FORMS for node in gm.graph.nodes):
        return gm
    copy, _ = copy_with_nodes(gm)
    for node in copy.graph.nodes:
        node.target = _FORMS.get(node.target, node.target)
    copy.recompile()
    return copy
