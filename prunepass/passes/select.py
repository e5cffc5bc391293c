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
from prunepass.passes.live import DEAD, FREE, STRIDE, maximum
from prunepass.passes.samples import kept_faults
from prunepass.passes.state import Kept, Rewrite, latest
from prunepass.plan import Protect, Stage, kept_count, share_of
from prunepass.plan.counts import MAX_LENGTH

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
    order: Tensor,
    width: Any = None,
    count: Tensor | None = None,
    end: Tensor | None = None,
    positions: Tensor | None = None,
    padding: Tensor | None = None,
    leaving: Tensor | None = None,
    alive: Tensor | None = None,
    longest: int = MAX_LENGTH,
) -> Selection:
    """Keep each row's best tokens.

    Row b keeps ``k_b`` of its tokens (`kept_count` of its original live tokens) and gets K slots, the same formula on
    ``length``. Ties go to the earlier token. Surplus slots (k_b < K) are dead, and hold the next best tokens where they
    stand, so that a row's last slot is still its last token's.

    Args:
        scores: [B, T] floating.
        length: the original length S (int or SymInt).
        order: [B, T] int64, as by `live_tokens`, at these slots.
        width: K, where it was computed before.
        count: [B, 1] int64, original live tokens; None where there is no padding, or ``end`` is given.
        end: [B, 1] int64, the place of the last token that each row keeps, where ``count`` and ``stage`` do not say it.
        positions: [B, T] int64, original positions of the slots; None before the first stage, where they are the slots.
        padding: [B, 1] int64, as by `live_tokens`.
        leaving: [B, 1] int64, as by `live_tokens`: how many may leave, of which the stage keeps its share.
        alive: [B, T] bool, False at surplus slots; needed where a row without padding may have some, as then no order
            tells them from a token. None where all slots hold what ``order`` says.
        longest: an upper bound of ``count`` and ``leaving``, see `plan.share_of`.
    """
    if alive is not None:
        order = torch.where(alive, order, DEAD)
    if width is None:
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=maximum)
    if end is None and count is not None and padding is not None:
        end = _end(count, stage, protect, leaving, longest)
    best = torch.topk(_ranked(scores, order, width, end), width, dim=1, largest=False).indices
    # the best in the order of their slots, and the place of each among the best
    index, place = torch.topk(best, width, dim=1, largest=False)
    original = index if positions is None else positions.gather(1, index)
    if end is None or padding is None:
        return Selection(index, original, None)
    kept = place <= end
    return Selection(index, torch.where(kept, original, padding), kept)


def select_mask(
    scores: Tensor,
    length: Any,
    stage: Stage,
    protect: Protect,
    *,
    order: Tensor,
    width: Any = None,
    alive: Tensor | None = None,
    count: Tensor | None = None,
    end: Tensor | None = None,
    leaving: Tensor | None = None,
    longest: int = MAX_LENGTH,
) -> Tensor:
    """The same choice as `select`, as a [B, S] bool mask over the original slots; the same arguments, with T = S.

    Args:
        alive: [B, S] bool, the tokens that earlier stages and padding left; None where all are there.
    """
    if width is None:
        width = kept_count(length, stage.keep, protect, minimum=_minimum, maximum=maximum)
    if end is None and count is not None:
        end = _end(count, stage, protect, leaving, longest)
    if alive is not None:
        order = torch.where(alive, order, DEAD)
    ranked = _ranked(scores, order, width, end)
    keep: Tensor = ranked <= _at(torch.topk(ranked, width, dim=1, largest=False).values, end)
    return keep if alive is None else keep & alive


def _end(count: Tensor, stage: Stage, protect: Protect, leaving: Tensor | None, longest: int) -> Tensor:
    """[B, 1] int64, the place of the last token that each row keeps: one less than their number."""
    if leaving is not None:
        some: Tensor = count - leaving + share_of(leaving, stage.keep, longest)
        return some - 1
    budget: Tensor = kept_count(count, stage.keep, protect, minimum=torch.minimum, maximum=maximum, longest=longest)
    return budget - 1


def _ranked(scores: Tensor, order: Tensor, width: Any, end: Tensor | None) -> Tensor:
    """[B, T] int64, no two live tokens alike: the smallest ``end + 1`` of each row, by default ``width``, stay.

    They are those protected by position, then by id or segment, then the best of the others.

    A sort of the scores tells the score of the last one to stay. Of the others those above it, on it and below it come
    in that order, each by position: that settles ties, and no runtime needs a stable sort, which some are slow at.
    Protection and life are whole numbers and never become finite scores, so that what runs the graph may hold scores
    in any floating type. NaN counts as minus infinity.
    """
    there = torch.where(order < DEAD, scores, -torch.inf)
    # no other comparison is False for NaN on every runtime
    key = torch.where(order < FREE, torch.inf, torch.where(scores == scores, there, -torch.inf))
    # by its place: a runtime may sort in another precision than it compares (OpenVINO in bfloat16, a converted ONNX
    # file), and then no token might be level with what the sort gives
    last = key.gather(1, _at(torch.topk(key, width, dim=1).indices, end))
    return order + torch.where(key > last, 0, torch.where(key == last, STRIDE, 2 * STRIDE))


def _at(best: Tensor, end: Tensor | None) -> Tensor:
    """[B, 1] of [B, K]: what stands at each row's last place; in a row that keeps nothing, at any."""
    return best[:, -1:] if end is None else best.gather(1, end.clamp(min=0))


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
            "order": rewrite.at_slots(live.order, before) if gathers else live.order,
            "count": live.count if site.end is None else None,
            "end": site.end,
            "leaving": live.leaving,
        }
        if gathers:
            named |= {"positions": before.positions if before is not None else None, "padding": live.padding}
        if before is not None and (not gathers or live.leaving is not None):
            named["alive"] = before.alive
        given = {k: v for k, v in named.items() if v is not None}
        shapes = {"count": ("B", 1), "end": ("B", 1), "padding": ("B", 1), "leaving": ("B", 1)}
        types = {"alive": torch.bool}
        # scores of the input, or of no state at all, may stand before what is known of the live tokens and the count
        with rewrite.graph.inserting_after(latest(site.scores, site.width, *given.values())):
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

        longest = rewrite.longest

        def build(scores: Tensor, width: int, *rest: Tensor) -> Any:
            extra: dict[str, Any] = dict(zip(given, rest, strict=True)) | {"longest": longest}
            if not gathers:
                return select_mask(scores, None, stage, protect, width=width, **extra)
            chosen = select(scores, None, stage, protect, width=width, **extra)
            return chosen.index, chosen.positions, chosen.alive

        key = ("select", rewrite.mode, stage.keep, protect, longest, tuple(given))
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
