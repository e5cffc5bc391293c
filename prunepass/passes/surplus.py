"""Slots that hold no token, hidden from attention by themselves.

Surplus slots carry the position of padding, and whatever masks padding masks them too. Where only some tokens may
leave, a row without padding may have surplus slots, as another row has more tokens that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.trace import Operand
from prunepass.passes.attending import attentions_below, put_mask
from prunepass.passes.contract import Fault, SitePass
from prunepass.passes.state import Rewrite

__all__ = ["HideSurplus"]


@dataclass(frozen=True)
class HideSurplus(SitePass):
    """``attention(q, k, v, mask)`` -> ``attention(q, k, v, mask & alive)`` between this cut and the next."""

    name = "surplus"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if self.site.kept is None or self.site.kept.alive is None or self.site.narrowed is None:
            yield Fault("It is not known which slots hold a token.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns the number of attentions changed."""
        made: dict[tuple[Node | None, bool], Node] = {}
        attentions = attentions_below(state, self.site)
        for node in attentions:
            if node.target is SDPA:
                self._in_mask(state, node, made)
            else:
                self._in_scores(state, node)
        return len(attentions)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for node in attentions_below(state, self.site):
            hidden = attention_arguments(node).get("attn_mask") if node.target is SDPA else node.args[0]
            if not self.is_mine(hidden):
                yield Fault("It attends to slots that hold no token.", node)

    def _in_mask(self, state: Rewrite, node: Node, made: dict[tuple[Node | None, bool], Node]) -> None:
        given = attention_arguments(node)
        mask, is_causal = given.get("attn_mask"), bool(given.get("is_causal", False))
        if (mask, is_causal) not in made:
            made[mask, is_causal] = self._hidden(state, node, given["query"], mask, is_causal)
        put_mask(node, made[mask, is_causal])

    def _hidden(self, state: Rewrite, node: Node, query: Node, mask: Node | None, is_causal: bool) -> Node:
        operands = [self._alive(state), state.operand(query, length="T")]
        operands += [] if mask is None else [state.operand(mask, length="T")]

        def build(alive: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
            seen = alive[:, None, None, :]
            if is_causal:
                slots = torch.arange(query.shape[2], device=query.device)
                seen = seen & (slots[None, :] <= slots[:, None])
            if mask is None:
                return seen.expand(alive.shape[0], 1, query.shape[2], alive.shape[1])
            return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)

        with state.graph.inserting_before(node):
            out = state.inline(build, operands, stage=self.site.index, role=self.name, key=(self.name, is_causal))
        assert isinstance(out, Node)
        heads = operands[2].shape[-3] if mask is not None and len(operands[2].shape) > 2 else 1
        dtype = torch.bool if mask is None else operands[2].dtype
        state.operands[out] = Operand(out, ("B", heads, "T", "T"), dtype, state.device)
        return out

    def _in_scores(self, state: Rewrite, node: Node) -> None:
        scores = node.args[0]
        assert isinstance(scores, Node)
        operands = [self._alive(state), state.operand(scores, length="T")]

        def build(alive: Tensor, scores: Tensor) -> Tensor:
            return torch.where(alive[:, None, None, :], scores, torch.finfo(scores.dtype).min)

        with state.graph.inserting_before(node):
            out = state.inline(build, operands, stage=self.site.index, role=self.name, key=(self.name, "scores"))
        node.replace_input_with(scores, out)

    def _alive(self, state: Rewrite) -> Operand:
        assert self.site.kept is not None
        assert self.site.kept.alive is not None
        return state.operand(self.site.kept.alive, "B", "T", dtype=torch.bool)
