"""Positions that a stateful cache keeps for layers that attend in a window.

A window counts positions of the text, and below a stage the slots of a cache are fewer than those. So each token's
position stays beside its keys, as three digits of base 256 in floating point: runtimes that compute in bfloat16 keep
those exactly, and states of integers are not taken by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.passes.contract import Fault, Pass, is_ours
from prunepass.passes.state import Rewrite, latest

__all__ = ["BASE", "DIGITS", "ReturnPositions", "digits_of", "number_of", "split_positions"]

aten = torch.ops.aten
BASE = 256
#: positions below 256 ** 3
DIGITS = 3
_SPREADS = (aten.expand.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
#: inserts an operator and gives its node
Call = Callable[..., Node]


def digits_of(call: Call, positions: Node) -> Node:
    """[B, 1, S, DIGITS] float32 of positions [B, S] int64."""
    left, parts = positions, []
    for _ in range(DIGITS):
        parts.append(call(aten.remainder.Scalar, left, BASE))
        left = call(aten.floor_divide.Scalar, left, BASE)
    digits = call(aten.to.dtype, call(aten.stack.default, parts, -1), torch.float32)
    return call(aten.unsqueeze.default, digits, 1)


def number_of(call: Call, digits: Node) -> Node:
    """[B, 1, S] int64 of digits [B, 1, S, DIGITS]."""
    whole = call(aten.to.dtype, digits, torch.int64)
    total = call(aten.select.int, whole, -1, DIGITS - 1)
    for i in reversed(range(DIGITS - 1)):
        total = call(aten.add.Tensor, call(aten.mul.Scalar, total, BASE), call(aten.select.int, whole, -1, i))
    return total


def split_positions(cached: Node) -> tuple[Node, Node | None]:
    """Keys or values, and the digits [B, 1, K, DIGITS] that `ReturnPositions` put beside them; None where there are
    none."""
    parts: Any = cached.args[0] if cached.args else None
    if cached.target is not aten.cat.default or cached.args[1:] not in ((-1,), (3,)) or len(parts) != 2:
        return cached, None
    keys, digits = parts
    while digits.target in _SPREADS:
        digits = digits.args[0]
    return keys, digits


@dataclass(frozen=True)
class ReturnPositions(Pass):
    """``k[kept]`` -> ``cat([k[kept], digits(position_ids[kept])], -1)`` for the first cache below each stage, whose
    output so tells where its tokens stood. The graph has an input ``position_ids`` [B, S]."""

    name = "positions"

    def run(self, state: Rewrite) -> int:
        """Returns how many caches have positions beside them."""
        ids = next(n for n in state.placeholders if n.name == "position_ids")
        done: set[int] = set()
        for old, new in zip(state.outputs, state.results(), strict=True):
            if old not in state.cached or state.level[old] in done:
                continue
            done.add(state.level[old])
            self._beside(state, old, new, ids)
        return len(done)

    def _beside(self, state: Rewrite, old: Node, new: Node, ids: Node) -> None:
        site = state.sites[state.level[old] - 1]
        assert site.kept is not None
        positions = site.kept.positions
        assert positions is not None

        def digits(ids: Tensor, positions: Tensor) -> Tensor:
            left, parts = ids.gather(1, positions), []
            for _ in range(DIGITS):
                parts.append(left % BASE)
                left = left // BASE
            return torch.stack(parts, -1).to(torch.float32)[:, None]

        def joined(x: Tensor, digits: Tensor) -> Tensor:
            return torch.cat([x, digits.expand(-1, x.shape[1], -1, -1).to(x.dtype)], -1)

        like = state.value(old)
        with state.graph.inserting_before(latest(ids, positions).next):  # masks of this stage's attention read it
            operands = [state.operand(ids), state.operand(positions, "B", "K", dtype=torch.int64)]
            at = state.inline(digits, operands, stage=site.index, role=self.name, key="digits")
        with state.graph.inserting_before(state.output):
            operands = [
                state.operand(new, "B", like.shape[1], "K", like.shape[3], dtype=like.dtype),
                state.operand(at, "B", 1, "K", DIGITS, dtype=torch.float32),
            ]
            made = state.inline(joined, operands, stage=site.index, role=self.name, key=("beside", like.shape[1]))
        state.output.replace_input_with(new, made)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        levels = {state.level[old] for old in state.outputs if old in state.cached}
        made = [n for n in state.results() if isinstance(n, Node) and is_ours(n) and _made_by(n) == self.name]
        if len(made) != len(levels):
            yield Fault(f"{len(made)} caches have positions beside them, of {len(levels)} stages.", state.output)


def _made_by(node: Node) -> str:
    return str(node.meta["prunepass"]["pass"])
