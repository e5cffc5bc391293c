"""Attention that counts how many tokens each merged state stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.trace import Operand
from prunepass.passes.attending import attentions_below, put_mask
from prunepass.passes.contract import Fault, SitePass
from prunepass.passes.state import Rewrite

__all__ = ["Weigh", "weigh_in_mask", "weigh_in_scores"]


def weigh_in_mask(query: Tensor, sizes: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The mask of fused attention with ``log(size)`` added for each key: a key that stands for n tokens draws the
    attention of n such keys (ToMe, arXiv:2210.09461, "proportional attention").

    Args:
        query: [B, H, T, d], or [B * H, T, d].
        sizes: [B, T] floating, 1 and more at live slots.
        mask: as fused attention takes it; None for none.
        is_causal: whether later keys are hidden.

    Returns:
        In the dtype of the query, [B, 1, 1, T] or as wide as the mask.
    """
    bias = _log(sizes, query.dtype)[:, None, None, :]
    if query.dim() == 3:
        bias = bias[:, 0].repeat_interleave(query.shape[0] // sizes.shape[0], dim=0)
    least = torch.finfo(bias.dtype).min
    if is_causal:
        slots = torch.arange(query.shape[-2], device=query.device)
        bias = torch.where(slots[None, :] > slots[:, None], least, bias)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, least)
    return mask + bias.to(mask.dtype)


def weigh_in_scores(scores: Tensor, sizes: Tensor) -> Tensor:
    """Attention scores [B, H, T, T] or [B * H, T, T] with ``log(size)`` added for each key."""
    bias = _log(sizes, scores.dtype)[:, None, None, :]
    if scores.dim() == 3:
        bias = bias[:, 0].repeat_interleave(scores.shape[0] // sizes.shape[0], dim=0)
    return scores + bias


def _log(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.log(sizes.clamp(min=1)).to(dtype)  # surplus slots stand for none, and are hidden


@dataclass(frozen=True)
class Weigh(SitePass):
    """``attention(q, k, v, mask)`` -> ``attention(q, k, v, mask + log(size))`` between this cut and the next, in plans
    that merge."""

    name = "weigh"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if self.site.merged is None:
            yield Fault("Nothing says how many tokens each state stands for.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns the number of attentions changed."""
        made: dict[Any, Node] = {}
        nodes = attentions_below(state, self.site)
        for node in nodes:
            if node.target is SDPA:
                self._in_sdpa(state, node, made)
            else:
                self._in_softmax(state, node)
        return len(nodes)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for node in attentions_below(state, self.site):
            given = attention_arguments(node) if node.target is SDPA else {}
            if not self.is_mine(given.get("attn_mask") if given else node.args[0]) or given.get("is_causal"):
                yield Fault("A key that stands for many tokens counts as one.", node)

    def _in_sdpa(self, state: Rewrite, node: Node, made: dict[Any, Node]) -> None:
        given = attention_arguments(node)
        query, mask, is_causal = given["query"], given.get("attn_mask"), bool(given.get("is_causal", False))
        if (mask, is_causal) not in made:
            slots = self._slots(state)
            operands = [state.operand(query, length=slots), self._sizes(state)]
            operands += [state.operand(mask, length=slots)] if mask is not None else []

            def build(query: Tensor, sizes: Tensor, mask: Tensor | None = None) -> Tensor:
                return weigh_in_mask(query, sizes, mask, is_causal)

            with state.graph.inserting_before(node):
                out = state.inline(build, operands, stage=self.site.index, role=self.name, key=("weigh", is_causal))
            state.operands[out] = Operand(out, *self._layout(state, operands, is_causal), state.device)
            made[mask, is_causal] = out
        put_mask(node, made[mask, is_causal])

    def _layout(self, state: Rewrite, operands: list[Operand], is_causal: bool) -> tuple[tuple[Any, ...], torch.dtype]:
        """Axes and dtype of the new mask."""
        query, mask, slots = operands[0], operands[2] if len(operands) > 2 else None, self._slots(state)
        rows = slots if is_causal else 1
        if len(query.shape) == 3:
            shape: tuple[Any, ...] = (query.shape[0], rows, slots)
        else:
            shape = ("B", 1, rows, slots)
        if mask is not None:
            wide = (*([1] * (len(shape) - len(mask.shape))), *mask.shape)
            shape = tuple(mine if theirs == 1 else theirs for mine, theirs in zip(shape, wide, strict=True))
        return shape, query.dtype if mask is None or mask.dtype == torch.bool else mask.dtype

    def _in_softmax(self, state: Rewrite, node: Node) -> None:
        scores = node.args[0]
        assert isinstance(scores, Node)
        operands = [state.operand(scores, length=self._slots(state)), self._sizes(state)]
        with state.graph.inserting_before(node):
            out = state.inline(weigh_in_scores, operands, stage=self.site.index, role=self.name, key=("weigh",))
        state.operands[out] = Operand(out, operands[0].shape, operands[0].dtype, state.device)
        node.replace_input_with(scores, out)

    def _sizes(self, state: Rewrite) -> Operand:
        assert self.site.merged is not None
        dtype = torch.float64 if state.value(self.site.cut).dtype == torch.float64 else torch.float32
        return state.operand(self.site.merged.sizes, "B", self._slots(state), dtype=dtype)

    def _slots(self, state: Rewrite) -> str:
        return "T" if state.mode == "gather" else "S"  # as `passes.side` calls what a stage keeps
