"""The attentions below a cut, whose keys stages hide and weigh."""

from __future__ import annotations

from torch.fx import Node

from prunepass.graph.ops import attention_arguments, is_attention
from prunepass.passes.short import attends_to_stream, is_memory
from prunepass.passes.state import Rewrite, Site

__all__ = ["attentions_below", "put_mask"]


def attentions_below(state: Rewrite, site: Site) -> list[Node]:
    """Those between a site's cut and the next that have the stream's tokens as keys, in the graph's order: fused ones,
    and softmaxes over the keys. The cross-attention of a decoder is among them, where it stands below the cut."""
    level, sizes = state.sites.index(site) + 1, state.sizes
    found = [n for n in state.graph.nodes if state.level.get(n) == level]
    return [n for n in found if is_memory(n, sizes) or (is_attention(n, sizes) and attends_to_stream(n, sizes))]


def put_mask(node: Node, mask: Node) -> None:
    """Give fused attention this mask in the place of its own, and of looking back only, which the mask now says."""
    given = attention_arguments(node)
    node.args = (given["query"], given["key"], given["value"], mask, given.get("dropout_p", 0.0))
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal", "dropout_p")}
