"""Mask mode: pruned tokens stay, but no later attention sees them as keys: gathering's differentiable reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.ops import SDPA, is_attention
from prunepass.graph.trace import Operand
from prunepass.passes.state import Rewrite, Site

__all__ = ["Hide"]

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def visible_keys(alive: Tensor, length: Any) -> Tensor:
    """[B, 1, S, S] bool: which keys a query sees. A pruned token still sees itself, so that no row is left empty."""
    slots = torch.arange(length, device=alive.device)
    return alive[:, None, None, :] | (slots[None, :] == slots[:, None])


def hide_in_mask(query: Tensor, alive: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The mask of fused attention with the pruned keys hidden: bool stays bool, an added one gets the lowest number."""
    visible = visible_keys(alive, query.shape[-2])
    if is_causal:
        slots = torch.arange(query.shape[-2], device=query.device)
        visible = visible & (slots[None, :] <= slots[:, None])
    if query.dim() == 3:
        visible = visible[:, 0]
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return torch.where(visible, mask, torch.finfo(mask.dtype).min)


def hide_in_scores(scores: Tensor, alive: Tensor) -> Tensor:
    """Attention scores [B, H, S, S] or [B * H, S, S] with pruned keys at the lowest number."""
    visible = visible_keys(alive, scores.shape[-1])
    if scores.dim() == 3:
        heads = scores.shape[0] // alive.shape[0]
        visible = visible[:, 0].repeat_interleave(heads, dim=0)
    return torch.where(visible, scores, torch.finfo(scores.dtype).min)


@dataclass(frozen=True)
class Hide:
    """``attention(q, k, v, mask)`` -> ``attention(q, k, v, mask & alive)`` between this cut and the next."""

    name = "hide"

    def run(self, rewrite: Rewrite, site: Site) -> int:
        """Returns the number of attentions changed."""
        assert site.kept is not None
        assert site.kept.alive is not None
        level = rewrite.sites.index(site) + 1
        made: dict[Any, Node] = {}
        count = 0
        for node in list(rewrite.graph.nodes):
            if rewrite.level.get(node) != level or not is_attention(node, rewrite.sizes):
                continue
            if node.target is SDPA:
                self._in_sdpa(rewrite, site, node, made)
            else:
                self._in_softmax(rewrite, site, node)
            count += 1
        return count

    def _in_sdpa(self, rewrite: Rewrite, site: Site, node: Node, made: dict[Any, Node]) -> None:
        arguments: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False))
        mask = arguments.get("attn_mask", node.kwargs.get("attn_mask"))
        is_causal = bool(arguments.get("is_causal", node.kwargs.get("is_causal", False)))
        query: Node = arguments["query"]
        if (mask, is_causal) not in made:
            operands = [rewrite.operand(query), self._alive(rewrite, site)]
            operands += [rewrite.operand(mask)] if mask is not None else []

            def build(query: Tensor, alive: Tensor, mask: Tensor | None = None) -> Tensor:
                return hide_in_mask(query, alive, mask, is_causal)

            with rewrite.graph.inserting_before(node):
                out = rewrite.inline(build, operands, stage=site.index, role=self.name, key=("hide", is_causal))
            device = rewrite.device
            dtype = rewrite.value(mask).dtype if mask is not None else torch.bool
            rewrite.operands[out] = Operand(out, ("B", *self._inner(rewrite, query, mask), "S", "S"), dtype, device)
            made[mask, is_causal] = out
        key, value, dropout = arguments["key"], arguments["value"], arguments.get("dropout_p", 0.0)
        node.args = (query, key, value, made[mask, is_causal], dropout)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}

    def _inner(self, rewrite: Rewrite, query: Node, mask: Node | None) -> tuple[Any, ...]:
        """The head axis of the combined mask."""
        if rewrite.value(query).dim() == 3:
            return ()
        extents = rewrite.extents(mask) if mask is not None else ()
        return (extents[-3] if len(extents) >= 3 else 1,)

    def _in_softmax(self, rewrite: Rewrite, site: Site, node: Node) -> None:
        scores = node.args[0]
        assert isinstance(scores, Node)
        operands = [rewrite.operand(scores), self._alive(rewrite, site)]
        with rewrite.graph.inserting_before(node):
            out = rewrite.inline(hide_in_scores, operands, stage=site.index, role=self.name, key=("hide-scores",))
        node.replace_input_with(scores, out)

    def _alive(self, rewrite: Rewrite, site: Site) -> Operand:
        assert site.kept is not None
        assert site.kept.alive is not None
        return rewrite.operand(site.kept.alive, "B", "S", dtype=torch.bool)
