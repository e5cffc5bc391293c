"""Which tokens stay: plain torch functions on scores, and the pass that puts them into the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.trace import Number
from prunepass.passes.contract import Fault, SitePass, layout_faults
from prunepass.passes.live import BY_CONTENT, BY_POSITION, maximum
from prunepass.passes.samples import kept_faults
from prunepass.passes.state import Kept, Rewrite, latest
from prunepass.plan import Protect, Stage, kept_count, share_of

__all__ = ["InsertSelect", "Selection", "select", "select_mask"]


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
    leaving: Tensor | None = None,
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
        leaving: [B, 1] int64, as by `live_tokens`: how many may leave, of which the stage keeps its share.
    """
    if width is None:
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=maximum)
    budget = None if count is None or padding is None else _budget(count, stage, protect, leaving)
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
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=maximum)
    budget = None if count is None else _budget(count, stage, protect)
    return _kept(scores, width, budget, alive, protected, protect)


def _budget(count: Tensor, stage: Stage, protect: Protect, leaving: Tensor | None = None) -> Tensor:
    """[B, 1] int64, how many tokens each row keeps."""
    if leaving is not None:
        some: Tensor = count - leaving + share_of(leaving, stage.keep)
        return some
    budget: Tensor = kept_count(count, stage.keep, protect, minimum=torch.minimum, maximum=maximum)
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


def _minimum(a: Any, b: Any) -> Any:
    return torch.sym_min(a, b)


@dataclass(frozen=True)
class InsertSelect(SitePass):
    """``scores`` -> ``index, positions, alive`` (gather mode), or ``-> alive`` over all slots (mask mode)."""

    name = "select"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.live is None or self.site.scores is None:
            yield Fault("There are no scores to choose by.", self.site.cut)

    def run(self, state: Rewrite) -> int:
        """Sets ``site.width`` and ``site.kept``."""
        rewrite, site = state, self.site
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
            named["leaving"] = live.leaving
        given = {k: v for k, v in named.items() if v is not None}
        shapes = {"count": ("B", 1), "padding": ("B", 1), "leaving": ("B", 1)}
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

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        kept, live = self.site.kept, state.live
        if kept is None or live is None:
            yield Fault("No tokens were chosen.", self.site.scores)
            return
        if state.mode != "gather":
            yield from layout_faults(state, kept.alive, "marks of kept tokens", ("B", "S"), torch.bool)
            return
        yield from layout_faults(state, kept.index, "indices of kept tokens", ("B", "K"), torch.int64)
        yield from layout_faults(state, kept.positions, "positions of kept tokens", ("B", "K"), torch.int64)
        if kept.alive is not None:
            yield from layout_faults(state, kept.alive, "marks of kept tokens", ("B", "K"), torch.bool)
        if (kept.alive is None) != (live.count is None):
            yield Fault("Slots that hold no token are marked where there is padding, and only there.", kept.index)
        yield from self._order_faults(kept.index)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return kept_faults(state, self.site)

    def _order_faults(self, index: Node | None) -> Iterator[Fault]:
        """Ascending is what the K smallest slots come in."""
        source = index.args[0] if index is not None and index.target is operator.getitem else None
        if not isinstance(source, Node) or source.target is not torch.ops.aten.topk.default:
            yield Fault("The indices are not the smallest of some slots, so their order is not known.", index)
            return
        if source.args[1] is not self.site.width:
            yield Fault(f"{source.args[1]} slots are kept in place of {self.site.width}.", source)
        if tuple(source.args[2:4]) != (1, False) or tuple(source.args[4:]) not in ((), (True,)):
            yield Fault("The indices do not ascend along each row.", source)
