"""Which tokens stay: plain torch functions on scores, and the pass that puts them into the graph."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from prunepass.graph.trace import Number
from prunepass.passes.segments import named_tokens, types_of
from prunepass.passes.state import Kept, Live, Rewrite, Site, latest
from prunepass.plan import Protect, Stage, kept_count, protected_last

__all__ = ["InsertLive", "InsertSelect", "LiveTokens", "Selection", "live_tokens", "select", "select_mask"]

BY_CONTENT, BY_POSITION = 1, 2


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
    """

    alive: Tensor | None
    rank: Tensor
    count: Tensor | None
    padding: Tensor | None
    protected: Tensor
    end: Tensor


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
    last = protected_last(total, protect, maximum=_maximum)
    end = total - last
    by_position = (rank < protect.first) | (rank >= end)
    protected = by_position.to(torch.int64) * BY_POSITION
    named = named_tokens(protect, ids, types, alive)
    if named is not None:
        protected = torch.maximum(protected, named.to(torch.int64) * BY_CONTENT)
    return LiveTokens(alive, rank, count, padding, protected, end)


@dataclass(frozen=True)
class Selection:
    """What a stage keeps, for K slots of each row in ascending order of position.

    Attributes:
        index: [B, K] int64 into the T slots that reached the stage.
        positions: [B, K] int64, original positions; at surplus slots the position of a padding token, so that whatever
            masks padding masks them too.
        alive: [B, K] bool, False at surplus slots; None where there are none.
    """

    index: Tensor
    positions: Tensor
    alive: Tensor | None


def select(
    scores: Tensor,
    length: Any,
    stage: Stage,
    protect: Protect,
    *,
    width: Any = None,
    alive: Tensor | None = None,
    protected: Tensor | None = None,
    count: Tensor | None = None,
    positions: Tensor | None = None,
    padding: Tensor | None = None,
) -> Selection:
    """Keep each row's best tokens.

    Row b keeps ``k_b`` of its tokens (`kept_count` of its original live tokens) and gets K slots, the same formula on
    ``length``. Ties go to the earlier token; surplus slots (k_b < K) are dead.

    Args:
        scores: [B, T] floating.
        length: the original length S (int or SymInt).
        width: K, where it was computed before.
        alive: [B, T] bool, or None where all are.
        protected: [B, T] int64, as by `live_tokens`.
        count: [B, 1] int64, original live tokens; None where there is no padding.
        positions: [B, T] int64, original positions of the slots; None before the first stage.
        padding: [B, 1] int64, as by `live_tokens`.
    """
    if width is None:
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=_maximum)
    budget = None if count is None or padding is None else _budget(count, stage, protect)
    keep = _kept(scores, width, budget, alive, protected, protect)
    total = scores.shape[1]
    slots = torch.arange(total, device=scores.device)[None, :]
    # each row's earliest others fill its surplus slots, so that the last slot is still the last token's
    filled = keep
    if budget is not None:
        places = _places(keep)
        filled = keep | (slots - places < width - places[:, -1:])
    index = torch.topk(torch.where(filled, slots, total), width, dim=1, largest=False).values
    original = index if positions is None else positions.gather(1, index)
    if budget is None or padding is None:
        return Selection(index, original, None)
    kept = keep.gather(1, index)
    return Selection(index, torch.where(kept, original, padding), kept)


def select_mask(
    scores: Tensor,
    length: Any,
    stage: Stage,
    protect: Protect,
    *,
    width: Any = None,
    alive: Tensor | None = None,
    protected: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """The same choice as `select`, as a [B, S] bool mask over the original slots; the same arguments, with T = S."""
    if width is None:
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=_maximum)
    budget = None if count is None else _budget(count, stage, protect)
    return _kept(scores, width, budget, alive, protected, protect)


def _budget(count: Tensor, stage: Stage, protect: Protect) -> Tensor:
    """[B, 1] int64, how many tokens each row keeps."""
    budget: Tensor = kept_count(count, stage.keep, protect, minimum=torch.minimum, maximum=_maximum)
    return budget


def _kept(
    scores: Tensor, width: Any, budget: Tensor | None, alive: Tensor | None, protected: Tensor | None, protect: Protect
) -> Tensor:
    """[B, T] bool, true at ``budget`` tokens of each row, by default ``width``: those protected by position, then by
    id or segment, then the best of the others. Dead ones never.

    Protection and life are counted in whole numbers and never become scores, so that what runs the graph may hold
    scores in any floating type.
    """
    room = width if budget is None else budget
    if protected is None:
        return _best(scores, width, room, alive)
    live = torch.ones_like(scores, dtype=torch.bool) if alive is None else alive
    keep = live & (protected == BY_POSITION)  # they always fit, by the formula of the count
    room = room - _number(keep)
    if protect.by_content:
        named = live & (protected == BY_CONTENT)
        keep = keep | (named & (_places(named) <= room))
        room = (room - _number(named)).clamp(min=0)
    return keep | _best(scores, width, room, live & (protected == 0))


def _best(scores: Tensor, width: Any, room: Any, free: Tensor | None) -> Tensor:
    """[B, T] bool, true at each row's ``room`` best free tokens; of equal scores the earlier are better. NaN counts as
    minus infinity.

    A sort chooses, and only which of the tokens level with the last chosen one stay is decided by their places: no
    runtime needs a stable sort, which some are slow at. It chooses by indices: a runtime may sort in another precision
    than it compares (OpenVINO in bfloat16, a converted ONNX file), and a threshold could miss tokens well above it.

    Args:
        room: up to ``width``; a number or [B, 1] int64.
        free: [B, T] bool; None where all are.
    """
    number = scores == scores  # no other comparison is False for NaN on every runtime
    candidates = torch.where(number if free is None else number & free, scores, -torch.inf)
    order = torch.topk(candidates, width, dim=1).indices
    if isinstance(room, Tensor):
        within = (torch.arange(width, device=scores.device)[None, :] < room).to(torch.int64)
        last = order.gather(1, (room - 1).clamp(min=0))
    else:
        within, last = torch.ones_like(order), order[:, -1:]
    taken = torch.zeros_like(scores, dtype=torch.int64).scatter(1, order, within) != 0
    level = candidates == candidates.gather(1, last)
    above = taken & ~level
    if free is not None:
        above, level = above & free, level & free
    best: Tensor = above | (level & (_places(level) <= room - _number(above)))
    return best


def _places(chosen: Tensor) -> Tensor:
    """[B, T] int64, how many chosen tokens stand up to each. Not of bool: OpenVINO counts that in 8 bits."""
    return torch.cumsum(chosen.to(torch.int64), dim=1)


def _number(chosen: Tensor) -> Tensor:
    """[B, 1] int64, how many are chosen."""
    return chosen.to(torch.int64).sum(dim=1, keepdim=True)


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return a.clamp(min=b) if not isinstance(b, Tensor) else torch.maximum(a, b)
    return b.clamp(min=a) if isinstance(b, Tensor) else torch.sym_max(a, b)


def _minimum(a: Any, b: Any) -> Any:
    return torch.sym_min(a, b)


@dataclass(frozen=True)
class InsertLive:
    """``ids, mask`` -> ``alive, rank, count, padding, protected, end``: once, for all stages."""

    name = "live"

    def run(self, rewrite: Rewrite) -> int:
        """Sets ``rewrite.live``."""
        inputs, protect = rewrite.inputs, rewrite.plan.protect
        operands = [rewrite.operand(inputs.tokens, "B", "S")]
        mask = inputs.attention_mask
        if mask is not None:
            operands.append(rewrite.operand(mask, "B", "S"))
        wants_ids = bool(protect.token_ids) and inputs.token_ids is not None
        types = types_of(inputs) if protect.segment is not None else None
        if types is not None:
            operands.append(rewrite.operand(types, "B", "S"))
        names = [field.name for field in fields(LiveTokens)]

        def build(tokens: Tensor, *more: Tensor) -> Any:
            attention_mask = more[0] if mask is not None else None
            segments = more[-1] if types is not None else None
            found = live_tokens(tokens, attention_mask, tokens if wants_ids else None, protect, segments)
            return tuple(getattr(found, name) for name in names)

        with rewrite.graph.inserting_after(rewrite.last_placeholder):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (inputs.tokens,))
        with rewrite.graph.inserting_before(anchor):
            results = rewrite.inline(
                build,
                operands,
                stage=None,
                role=self.name,
                key=("live", protect, wants_ids, mask is None, types is None),
            )
        rewrite.graph.erase_node(anchor)
        rewrite.live = Live(**dict(zip(names, results, strict=True)))
        return 1


@dataclass(frozen=True)
class InsertSelect:
    """``scores`` -> ``index, positions, alive`` (gather mode), or ``-> alive`` over all slots (mask mode)."""

    name = "select"

    def run(self, rewrite: Rewrite, site: Site) -> int:
        """Sets ``site.width`` and ``site.kept``."""
        assert rewrite.live is not None
        assert site.scores is not None
        live, before, stage, protect = rewrite.live, rewrite.kept_before(site), site.stage, rewrite.plan.protect
        gathers = rewrite.mode == "gather"
        slots = "T" if gathers and before is not None else "S"
        named: dict[str, Any] = {
            "alive": before.alive if before is not None else live.alive,
            "protected": rewrite.at_slots(live.protected, before) if gathers else live.protected,
            "count": live.count,
        }
        if gathers:
            named |= {"positions": before.positions if before is not None else None, "padding": live.padding}
        given = {k: v for k, v in named.items() if v is not None}
        shapes = {"count": ("B", 1), "padding": ("B", 1)}
        types = {"alive": torch.bool}
        # where the cut is an input of the graph, what is known of the live tokens may stand after the scores
        with rewrite.graph.inserting_after(latest(site.scores, *given.values())):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (site.scores,))
        with rewrite.graph.inserting_before(anchor):
            site.width = rewrite.width(site)
        operands: list[Any] = [
            rewrite.operand(site.scores, "B", slots, dtype=rewrite.score_dtype(site)),
            Number(site.width, "K"),
            *(
                rewrite.operand(v, *shapes.get(k, ("B", slots)), dtype=types.get(k, torch.int64))
                for k, v in given.items()
            ),
        ]

        def build(scores: Tensor, width: int, *rest: Tensor) -> Any:
            extra = dict(zip(given, rest, strict=True))
            if not gathers:
                return select_mask(scores, None, stage, protect, width=width, **extra)
            chosen = select(scores, None, stage, protect, width=width, **extra)
            return chosen.index, chosen.positions, chosen.alive

        key = ("select", rewrite.mode, stage.keep, protect, tuple(given))
        with rewrite.graph.inserting_before(anchor):
            result = rewrite.inline(build, operands, stage=site.index, role=self.name, key=key)
        rewrite.graph.erase_node(anchor)
        site.kept = Kept(*result) if gathers else Kept(None, None, result)
        return 1
