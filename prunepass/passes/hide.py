"""Mask mode: pruned tokens stay, but no later attention sees them as keys: gathering's differentiable reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.trace import Operand
from prunepass.passes.attending import attentions_below, put_mask
from prunepass.passes.contract import Fault, SitePass
from prunepass.passes.merge import insert_merge, merges
from prunepass.passes.propagation import size_faults
from prunepass.passes.short import is_memory
from prunepass.passes.state import Rewrite, Site

__all__ = ["Hide"]

#: weight that a key of degree 0 keeps: lost beside any other in float32, but not to the gradient, where it cancels
LEAK = 1e-20


def visible_keys(alive: Tensor, length: Any) -> Tensor:
    """[B, 1, S, S] bool: which keys a query sees. A pruned token still sees itself, so that no row is left empty.

    Where others ask (``length`` is None), [B, 1, 1, S].
    """
    if length is None:
        return alive[:, None, None, :]
    slots = torch.arange(length, device=alive.device)
    return alive[:, None, None, :] | (slots[None, :] == slots[:, None])


def hide_in_mask(query: Tensor, alive: Tensor, mask: Tensor | None, is_causal: bool, memory: bool = False) -> Tensor:
    """The mask of fused attention with the pruned keys hidden: bool stays bool, an added one gets the lowest number.

    Args:
        memory: whether the queries are of other tokens than the keys, as in a decoder's cross-attention.
    """
    visible = visible_keys(alive, None if memory else query.shape[-2])
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


def hide_in_scores(scores: Tensor, alive: Tensor, memory: bool = False) -> Tensor:
    """Attention scores [B, H, S, S] or [B * H, S, S] with pruned keys at the lowest number; ``memory`` as above."""
    visible = visible_keys(alive, None if memory else scores.shape[-1])
    if scores.dim() == 3:
        heads = scores.shape[0] // alive.shape[0]
        visible = visible[:, 0].repeat_interleave(heads, dim=0)
    return torch.where(visible, scores, torch.finfo(scores.dtype).min)


def fade_in_mask(query: Tensor, degree: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The mask of fused attention with each key weighed by its degree z in [0, 1]: ``log(z + LEAK)`` is added.

    The softmax then gives key j the weight ``z_j exp(l_j) / sum z exp(l)``: masking as DynamicViT trains it. With the
    leak its gradient in z is right at z = 0 too, where that of ``log z`` is not: a token that is out can come back.
    """
    length = query.shape[-2]
    bias = _log_degree(degree, query.dtype)[:, None, None, :].expand(degree.shape[0], 1, length, length)
    if is_causal:
        slots = torch.arange(length, device=query.device)
        later = slots[None, :] > slots[:, None]
        bias = torch.where(later, torch.finfo(bias.dtype).min, bias)
    if query.dim() == 3:
        bias = bias[:, 0]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias.to(mask.dtype)


def fade_in_scores(scores: Tensor, degree: Tensor) -> Tensor:
    """Attention scores [B, H, S, S] or [B * H, S, S], keys weighed as by `fade_in_mask`."""
    bias = _log_degree(degree, scores.dtype)[:, None, None, :]
    if scores.dim() == 3:
        bias = bias[:, 0].repeat_interleave(scores.shape[0] // degree.shape[0], dim=0)
    return scores + bias


def _log_degree(degree: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.log(degree + LEAK).to(dtype)


@dataclass(frozen=True)
class Hide(SitePass):
    """``attention(q, k, v, mask)`` -> ``attention(q, k, v, mask & alive)`` between this cut and the next, or with a
    trained gate ``mask + log(degree)``."""

    name = "hide"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        kept = self.site.kept
        if state.mode != "mask" or kept is None or kept.alive is None:
            yield Fault(f"There are no marks of kept tokens to hide by in mode {state.mode!r}.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns the number of attentions changed, and of readers of merged states."""
        rewrite, site = state, self.site
        made: dict[Any, Node] = {}
        count = self._merge(rewrite)
        for node in attentions_below(rewrite, self.site):
            if node.target is SDPA:
                self._in_sdpa(rewrite, site, node, made)
            else:
                self._in_softmax(rewrite, site, node)
            count += 1
        return count

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        kept = self.site.kept
        assert kept is not None
        choice = kept.alive if kept.degree is None else kept.degree
        for node in attentions_below(state, self.site):
            given = attention_arguments(node) if node.target is SDPA else {}
            hidden = given.get("attn_mask") if node.target is SDPA else node.args[0]
            if given.get("is_causal"):
                yield Fault("It takes a mask, and masks later keys itself as well.", node)
            if not self._depends(hidden, choice):
                yield Fault("Its keys are seen whether their tokens are kept or not.", node)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return size_faults(state, state.sites.index(self.site) + 1)

    def _merge(self, state: Rewrite) -> int:
        """Below the cut kept tokens have the states that others were merged into."""
        if not merges(state):
            return 0
        self.site.narrowed = insert_merge(state, self.site, self.name)
        level = state.sites.index(self.site) + 1
        readers = [user for user in self.site.cut.users if state.level.get(user) == level]
        for user in readers:
            user.replace_input_with(self.site.cut, self.site.narrowed)
        return len(readers)

    def _depends(self, node: Any, choice: Node | None) -> bool:
        """Whether a value is worked out from the stage's choice by this pass."""
        todo = [node]
        while todo:
            at = todo.pop()
            if at is choice:
                return True
            if self.is_mine(at):
                todo += at.all_input_nodes
        return False

    def _in_sdpa(self, rewrite: Rewrite, site: Site, node: Node, made: dict[Any, Node]) -> None:
        assert site.kept is not None
        arguments = attention_arguments(node)
        mask, is_causal = arguments.get("attn_mask"), bool(arguments.get("is_causal", False))
        query: Node = arguments["query"]
        memory = is_memory(node, rewrite.sizes)
        if (mask, is_causal, memory) not in made:
            operands = [rewrite.operand(query), self._visible(rewrite, site)]
            operands += [rewrite.operand(mask)] if mask is not None else []
            hide = fade_in_mask if site.kept.degree is not None else hide_in_mask

            def build(query: Tensor, visible: Tensor, mask: Tensor | None = None) -> Tensor:
                if memory:
                    return hide_in_mask(query, visible, mask, is_causal, memory)
                return hide(query, visible, mask, is_causal)

            with rewrite.graph.inserting_before(node):
                out = rewrite.inline(build, operands, stage=site.index, role=self.name, key=(hide, is_causal, memory))
            device = rewrite.device
            dtype = rewrite.value(mask).dtype if mask is not None else torch.bool
            if site.kept.degree is not None and dtype == torch.bool:
                dtype = rewrite.value(query).dtype
            queries = rewrite.extents(query)[-2]
            if memory and mask is None:
                queries = 1
            shape = ("B", *self._inner(rewrite, query, mask), queries, "S")
            rewrite.operands[out] = Operand(out, shape, dtype, device)
            made[mask, is_causal, memory] = out
        put_mask(node, made[mask, is_causal, memory])

    def _inner(self, rewrite: Rewrite, query: Node, mask: Node | None) -> tuple[Any, ...]:
        """The head axis of the combined mask."""
        if rewrite.value(query).dim() == 3:
            return ()
        extents = rewrite.extents(mask) if mask is not None else ()
        return (extents[-3] if len(extents) >= 3 else 1,)

    def _in_softmax(self, rewrite: Rewrite, site: Site, node: Node) -> None:
        scores = node.args[0]
        assert isinstance(scores, Node)
        assert site.kept is not None
        operands = [rewrite.operand(scores), self._visible(rewrite, site)]
        memory = is_memory(node, rewrite.sizes)
        fades = site.kept.degree is not None and not memory

        def build(scores: Tensor, visible: Tensor) -> Tensor:
            return fade_in_scores(scores, visible) if fades else hide_in_scores(scores, visible, memory)

        with rewrite.graph.inserting_before(node):
            out = rewrite.inline(build, operands, stage=site.index, role=self.name, key=(self.name, fades, memory))
        rewrite.operands[out] = replace(operands[0], node=out)
        node.replace_input_with(scores, out)

    def _visible(self, rewrite: Rewrite, site: Site) -> Operand:
        assert site.kept is not None
        if site.kept.degree is not None:
            return rewrite.operand(site.kept.degree, "B", "S", dtype=torch.float32)
        assert site.kept.alive is not None
        return rewrite.operand(site.kept.alive, "B", "S", dtype=torch.bool)
