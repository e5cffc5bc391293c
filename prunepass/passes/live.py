"""Which tokens are live and which are protected: worked out once for all stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from prunepass.passes.contract import Fault, Pass, is_ours, layout_faults
from prunepass.passes.samples import live_faults
from prunepass.passes.segments import may_leave, named_tokens, types_of
from prunepass.passes.state import Live, Rewrite
from prunepass.plan import Protect, protected_last
from prunepass.plan.counts import MAX_LENGTH

__all__ = [
    "BY_CONTENT",
    "BY_POSITION",
    "DEAD",
    "FREE",
    "STRIDE",
    "InsertLive",
    "LiveTokens",
    "in_order",
    "live_tokens",
    "maximum",
]

BY_CONTENT, BY_POSITION = 1, 2
#: the numbers of `LiveTokens.order` are a position and a multiple of it that says what the token is
STRIDE = MAX_LENGTH
#: the smallest number in `LiveTokens.order` of a token that has to compete, and of one that is not there
FREE, DEAD = BY_POSITION * STRIDE, 5 * STRIDE


@dataclass(frozen=True)
class LiveTokens:
    """What is known of every row before any pruning.

    Attributes:
        alive: [B, S] bool, or None where all tokens are live.
        rank: [B, S] int64, place among the row's live tokens.
        count: [B, 1] int64, number of live tokens; None where all are.
        padding: [B, 1] int64, position of a dead token (0 where there is none); None where all are live.
        protected: [B, S] int64, 2 for tokens protected by position, 1 by id or segment, 0 for the others.
        end: [B, 1] int64, number of live tokens before those protected at the row's end.
        order: [B, S] int64, as by `in_order`.
        leaving: [B, 1] int64, number of tokens that may leave, where the plan says which; None where all may that are
            not protected.
    """

    alive: Tensor | None
    rank: Tensor
    count: Tensor | None
    padding: Tensor | None
    protected: Tensor
    end: Tensor
    order: Tensor
    leaving: Tensor | None = None


def live_tokens(
    tokens: Tensor,
    attention_mask: Tensor | None,
    ids: Tensor | None,
    protect: Protect,
    types: Tensor | None = None,
) -> LiveTokens:
    """What the compiled graph works out once for all stages.

    Args:
        tokens: [B, S, ...], for the shape only.
        attention_mask: [B, S], non-zero at live tokens; None where all are.
        ids: [B, S] token ids, needed where the plan protects ids.
        types: [B, S] token_type_ids, where the plan protects a segment and the model takes them.
    """
    batch, length = tokens.shape[0], tokens.shape[1]
    if attention_mask is None:
        slots = torch.arange(length, device=tokens.device, dtype=torch.int64)
        rank = slots[None, :].expand(batch, length)
        alive, count, padding = None, None, None
        total = torch.full((batch, 1), length, device=tokens.device, dtype=torch.int64)
    else:
        alive = attention_mask != 0
        ones = alive.to(torch.int64)
        rank = torch.cumsum(ones, dim=1) - 1
        count = ones.sum(dim=1, keepdim=True)
        padding = ones.argmin(dim=1, keepdim=True)
        total = count
    last = protected_last(total, protect, maximum=maximum)
    end = total - last
    by_position = (rank < protect.first) | (rank >= end)
    protected = by_position.to(torch.int64) * BY_POSITION
    named = named_tokens(protect, ids, types, alive)
    if named is not None:
        protected = torch.maximum(protected, named.to(torch.int64) * BY_CONTENT)
    leaving = may_leave(protect, ids, protected, alive)
    if leaving is None:
        return LiveTokens(alive, rank, count, padding, protected, end, in_order(protected, alive))
    protected = torch.where(leaving, protected, BY_POSITION)  # they always fit, as the count is of the others
    some = leaving.to(torch.int64).sum(dim=1, keepdim=True)
    return LiveTokens(alive, rank, count, padding, protected, end, in_order(protected, alive), some)


def in_order(protected: Tensor, alive: Tensor | None) -> Tensor:
    """[B, S] int64, in which tokens are chosen before any score is looked at: those protected by position, then by id
    or segment, then the free ones (from `FREE` on), then those that are not there (from `DEAD` on); each kind by
    position.

    One number says all three, so that stages carry one tensor from slot to slot. None leaves what float32 holds.

    Args:
        protected: [B, S] int64, as in `LiveTokens`.
        alive: [B, S] bool, or None where all are.
    """
    slots = torch.arange(protected.shape[1], device=protected.device)[None, :]
    order = (BY_POSITION - protected) * STRIDE + slots
    return order if alive is None else torch.where(alive, order, slots + DEAD)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two whole numbers, each an int, a SymInt or a tensor."""
    if isinstance(a, Tensor):
        return a.clamp(min=b) if not isinstance(b, Tensor) else torch.maximum(a, b)
    return b.clamp(min=a) if isinstance(b, Tensor) else torch.sym_max(a, b)


#: values of `LiveTokens`: their second axis and their dtype
_VALUES: tuple[tuple[str, str | int, torch.dtype], ...] = (
    ("alive", "S", torch.bool),
    ("rank", "S", torch.int64),
    ("count", 1, torch.int64),
    ("padding", 1, torch.int64),
    ("protected", "S", torch.int64),
    ("end", 1, torch.int64),
    ("order", "S", torch.int64),
    ("leaving", 1, torch.int64),
)


@dataclass(frozen=True)
class InsertLive(Pass):
    """``ids, mask`` -> ``alive, rank, count, padding, protected, end, order``: once, for all stages."""

    name = "live"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.live is not None:
            yield Fault("The live tokens were found before.", state.live.rank)

    def run(self, state: Rewrite) -> int:
        """Sets ``state.live``."""
        inputs, protect = state.inputs, state.plan.protect
        operands = [state.operand(inputs.tokens, "B", "S")]
        mask = inputs.attention_mask
        if mask is not None:
            operands.append(state.operand(mask, "B", "S"))
        wants_ids = bool(protect.token_ids or protect.restricts) and inputs.token_ids is not None
        beside = inputs.prompt.ids if inputs.prompt is not None and wants_ids else None
        types = types_of(inputs) if protect.segment is not None else None
        if types is not None:
            operands.append(state.operand(types, "B", "S"))
        if beside is not None:
            operands.append(state.operand(beside, "B", "S"))
        names = [field.name for field in fields(LiveTokens)]

        def build(tokens: Tensor, *more: Tensor) -> Any:
            attention_mask = more[0] if mask is not None else None
            segments = more[-1 if beside is None else -2] if types is not None else None
            ids = None if not wants_ids else tokens if beside is None else more[-1]
            found = live_tokens(tokens, attention_mask, ids, protect, segments)
            return tuple(getattr(found, name) for name in names)

        with state.graph.inserting_after(state.known_at):
            anchor = state.graph.create_node("call_function", torch.ops.aten.alias.default, (inputs.tokens,))
        key = ("live", protect, wants_ids, mask is None, types is None, beside is None)
        with state.graph.inserting_before(anchor):
            results = state.inline(build, operands, stage=None, role=self.name, key=key)
        state.graph.erase_node(anchor)
        state.live = Live(**dict(zip(names, results, strict=True)))
        return 1

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        live = state.live
        if live is None:
            yield Fault("Nothing says which tokens are live.")
            return
        for name, width, dtype in _VALUES:
            node = getattr(live, name)
            if node is not None or name in ("rank", "protected", "end", "order"):
                yield from layout_faults(state, node, f"{name} of live tokens", ("B", width), dtype)
        if (live.alive is None) != (state.inputs.attention_mask is None):
            yield Fault("Which tokens are live is known where there is an attention mask, and only there.", live.alive)
        told = {state.inputs.tokens, state.inputs.attention_mask, types_of(state.inputs), state.inputs.token_ids}
        for node in state.graph.nodes:
            if is_ours(node) and node.meta["prunepass"]["pass"] == self.name:
                for a in node.all_input_nodes:
                    if not is_ours(a) and a not in told:
                        yield Fault(f"It says which tokens are live by {a.name}, which is no input.", node)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return live_faults(state)
