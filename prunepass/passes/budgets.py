"""How many tokens each stage keeps where each call names a plan: an input ``level``, and a table of exact shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.passes.contract import Fault, Pass, layout_faults
from prunepass.passes.live import maximum
from prunepass.passes.samples import width_faults
from prunepass.passes.state import Rewrite, latest
from prunepass.plan.counts import count_of_shares
from prunepass.plan.levels import LEVEL, Levels

__all__ = ["InsertBudgets", "Table", "level_input"]

#: a common denominator above this would leave the whole numbers that runtimes divide exactly, see `plan.counts`
_LARGEST_DENOMINATOR = 2**14
_NAME = "prunepass_shares"


def level_input(state: Rewrite) -> Node | None:
    """The placeholder that says the level; None where the graph has none."""
    return next((node for node in state.placeholders if node.target == LEVEL), None)


@dataclass(frozen=True)
class Table:
    """Shares of all levels and stages as whole numbers.

    Attributes:
        over: [levels, stages] int64, numerators.
        under: the denominator of all; or [levels, stages] int64, where that would be too large.
        most: the largest values in both.
    """

    over: Tensor
    under: Tensor | int
    most: tuple[int, int]

    @classmethod
    def of(cls, levels: Levels) -> Table:
        """Of the shares that each level keeps at each stage."""
        shares = levels.shares()
        common = math.lcm(*(share.denominator for row in shares for share in row))
        if common <= _LARGEST_DENOMINATOR:
            over = torch.tensor([[int(share * common) for share in row] for row in shares])
            return cls(over, common, (common, common))
        over, under = (torch.tensor([[getattr(s, n) for s in row] for row in shares]) for n in _PARTS)
        return cls(over, under, (int(over.max()), int(under.max())))


_PARTS = ("numerator", "denominator")


@dataclass(frozen=True)
class InsertBudgets(Pass):
    """``level, counts`` -> ``K`` and the place of each row's last token, of each stage: once, for all stages.

    A level that there is not is taken for the nearest one. A stage that does not act in a level keeps the share that
    the stages before it have left: all tokens that reach it.
    """

    name = "budgets"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.live is None:
            yield Fault("Nothing says which tokens are live.")
        elif state.live.leaving is not None:
            yield Fault("Shares are of the tokens that may leave, and levels count all.", state.live.leaving)
        if state.levels is None or level_input(state) is None:
            yield Fault(f"There are no plans to choose from, or no input {LEVEL!r} that chooses.")

    def run(self, state: Rewrite) -> int:
        """Sets ``width`` and ``end`` of all sites, and ``state.chosen``. Returns the number of sites."""
        live, chooses, levels = state.live, level_input(state), state.levels
        assert live is not None
        assert chooses is not None
        assert levels is not None
        table = Table.of(levels)
        given = [table.over] if isinstance(table.under, int) else [table.over, table.under]
        tables = [
            state.buffer(f"{_NAME}_{part}", x, stage=None, role=self.name, persistent=False)
            for part, x in zip(_PARTS, given, strict=False)
        ]
        operands = [state.operand(state.inputs.tokens, "B", "S"), state.operand(chooses), *tables]
        if live.count is not None:
            operands.append(state.operand(live.count, "B", 1, dtype=torch.int64))
        protect, most, rows, longest = state.plan.protect, table.most, len(table.over), state.longest

        def build(tokens: Tensor, level: Tensor, over: Tensor, *more: Tensor) -> Any:
            rest = list(more)
            chosen = level.clamp(0, rows - 1)
            # that no share is more than 1 is known to us, and lets runtimes divide without a correction
            shares = over.index_select(0, chosen).clamp(0, most[0])
            under = (
                table.under if isinstance(table.under, int) else rest.pop(0).index_select(0, chosen).clamp(1, most[1])
            )

            def counts(n: Tensor) -> Tensor:
                found: Tensor = count_of_shares(
                    n, shares, under, most, protect, minimum=torch.minimum, maximum=maximum, longest=longest
                )
                return found

            length = torch.full((1, 1), tokens.shape[1], device=tokens.device, dtype=torch.int64)
            return chosen, counts(length)[0], counts(rest[0]) - 1 if rest else None

        with state.graph.inserting_after(latest(state.known_at, live.count, live.order)):
            anchor = state.graph.create_node("call_function", torch.ops.aten.alias.default, (state.inputs.tokens,))
        with state.graph.inserting_before(anchor):
            state.chosen, widths, ends = state.inline(build, operands, stage=None, role=self.name)
            for column, site in enumerate(state.sites):
                self._at_site(state, site.index, column, widths, ends)
        state.graph.erase_node(anchor)
        return len(state.sites)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        live = state.live
        for site in state.sites:
            if site.width is None or site.width.target is not torch.ops.aten.item.default:
                yield Fault(f"No level says how many tokens the stage {site.place} keeps.", site.width)
            if live is not None and live.count is not None:
                yield from layout_faults(state, site.end, "places of last tokens", ("B", 1), torch.int64)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return width_faults(state)

    def _at_site(self, state: Rewrite, index: int, column: int, widths: Node, ends: Node | None) -> None:
        """One column of the counts, as a number and, of each row, as a place."""
        site = state.sites[column]
        marks = {"prunepass": {"stage": index, "pass": self.name}}
        aten = torch.ops.aten
        found = state.graph.call_function(aten.select.int, (widths, 0, column))
        site.width = state.graph.call_function(aten.item.default, (found,))
        found.meta, site.width.meta = dict(marks), dict(marks)
        if ends is not None:
            operands = [state.operand(ends, "B", len(state.sites), dtype=torch.int64)]
            site.end = state.inline(
                lambda x: x[:, column : column + 1], operands, stage=index, role=self.name, key=("column", column)
            )
