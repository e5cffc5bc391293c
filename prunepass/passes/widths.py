"""How many slots each stage leaves where only some tokens may leave: a number that each call's own ids decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunepass.passes.contract import Fault, Pass
from prunepass.passes.samples import slot_faults
from prunepass.passes.state import Rewrite, latest
from prunepass.plan import share_of

__all__ = ["InsertWidths", "counts_slots"]

aten = torch.ops.aten


def counts_slots(state: Rewrite) -> bool:
    """Whether a graph counts the slots of its stages itself: some tokens may leave, and no input says how many do."""
    prompt = state.inputs.prompt
    return prompt is not None and not prompt.widths and state.plan.protect.restricts and bool(state.sites)


@dataclass(frozen=True)
class InsertWidths(Pass):
    """``count, leaving`` -> ``K = max over rows of count - leaving + ceil(keep * leaving)``, of each stage."""

    name = "widths"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        live = state.live
        if live is None or live.count is None or live.leaving is None:
            yield Fault("It is not known how many tokens may leave.", None if live is None else live.rank)

    def run(self, state: Rewrite) -> int:
        """Sets ``width`` of all sites. Returns their number."""
        live = state.live
        assert live is not None
        assert live.count is not None
        assert live.leaving is not None
        operands = [state.operand(n, "B", 1, dtype=torch.int64) for n in (live.count, live.leaving)]
        shares = [site.stage.keep for site in state.sites]

        def build(count: Tensor, leaving: Tensor) -> Tensor:
            stay = count - leaving
            return torch.cat([(stay + share_of(leaving, share)).amax(dim=0) for share in shares])

        with state.graph.inserting_after(latest(state.known_at, live.count, live.leaving, live.order)):
            anchor = state.graph.create_node("call_function", aten.alias.default, (state.inputs.tokens,))
        with state.graph.inserting_before(anchor):
            widths = state.inline(build, operands, stage=None, role=self.name, key=(self.name, tuple(shares)))
            for column, site in enumerate(state.sites):
                marks = {"prunepass": {"stage": site.index, "pass": self.name}}
                found = state.graph.call_function(aten.select.int, (widths, 0, column))
                site.width = state.graph.call_function(aten.item.default, (found,))
                found.meta, site.width.meta = dict(marks), dict(marks)
        state.graph.erase_node(anchor)
        return len(state.sites)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for site in state.sites:
            if site.width is None or site.width.target is not aten.item.default:
                yield Fault(f"Nothing says how many slots the stage {site.place} leaves.", site.width)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return slot_faults(state)
