"""A mean over a row's live tokens, which an export appends to the model, is taken of the tokens kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.head import behind_norms, leaving
from prunepass.graph.trace import Operand
from prunepass.passes.contract import Fault, Pass, is_ours, layout_faults
from prunepass.passes.fill import filling
from prunepass.passes.state import Rewrite

__all__ = ["PoolKept"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PoolKept(Pass):
    """``mean(restore(h[kept]))`` -> ``mean(h[kept])`` where pruned positions would get the mean of the tokens kept.

    The mean over a row whose other positions hold the mean of the tokens kept is that mean itself, so that nothing has
    to be restored. Runs before `Restore`, on a graph whose head is the mean that `export.pooling` appends, and perhaps
    norms before it; leaves any other graph as it is.
    """

    name = "pool"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for site in state.sites:
            if site.kept is None or (state.mode == "gather" and site.narrowed is None):
                yield Fault(f"The stage {site.place} has no effect yet.", site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns 1 where the mean is taken of the tokens kept, else 0."""
        found = _mean(state)
        if found is None:
            return 0
        total, hidden = found
        kept = state.sites[-1].kept
        assert kept is not None
        slots, dtype = f"K{len(state.sites)}", state.value(total).dtype
        value = state.value(hidden)
        operands = [Operand(hidden, ("B", slots, value.shape[-1]), value.dtype, state.device)]
        if kept.alive is not None:
            operands.append(state.operand(kept.alive, "B", slots, dtype=torch.bool))

        def build(states: Tensor, alive: Tensor | None = None) -> Tensor:
            return filling(states.to(dtype), alive, "mean")[:, 0]

        key = ("pool", len(operands), dtype)
        with state.graph.inserting_before(total):
            pooled = state.inline(build, operands, stage=state.sites[-1].index, role=self.name, key=key)
        for node in behind_norms(state.graph, state.stream_end, state.sizes) - {state.stream_end}:
            state.level[node] = len(state.sites)  # the norms before the mean stay as short as the stream
        total.replace_all_uses_with(pooled)
        _erase(state, total)
        state.pooled = pooled
        state.reads_protected = True  # the head reads the tokens kept, and no others
        return 1

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        if state.pooled is None:
            return
        yield from layout_faults(state, state.pooled, "pooled states", ("B", state.value(state.stream_end).shape[-1]))
        inside = behind_norms(state.graph, state.stream_end, state.sizes)
        for user in (user for node in inside for user in leaving(node, inside)):
            if not is_ours(user):
                yield Fault("It reads the pruned stream beside the mean of the tokens kept.", user)


def _mean(state: Rewrite) -> tuple[Node, Node] | None:
    """The sum that ends the mean, [B, D], and the states [B, S, D] that it is of; None where the head is another."""
    end, sites = state.stream_end, state.sites
    if state.plan.restore != "mean" or state.mode != "gather" or state.reads_protected or end is sites[-1].cut:
        return None
    inside = behind_norms(state.graph, end, state.sizes)
    reads = {user: node for node in inside for user in leaving(node, inside)}
    if len(reads) != 1:
        return None
    (user, hidden), *_ = reads.items()
    for target in (aten.to.dtype, aten.masked_fill.Scalar, aten.mul.Tensor):
        if user.target is not target:
            if target is aten.to.dtype:
                continue
            return None
        if target is aten.masked_fill.Scalar and not _hides_dead(user, state):
            return None
        if len(user.users) != 1:
            return None
        user = next(iter(user.users))
    is_sum = user.target is aten.sum.dim_IntList and list(_argument(user, 1)) == [1]
    return (user, hidden) if is_sum else None


def _hides_dead(node: Node, state: Rewrite) -> bool:
    """Whether a value is filled where the mask says that there is no token, which tells a mean over live tokens."""
    todo: list[Any] = [node.args[1]]
    while todo:
        at = todo.pop()
        if at is state.inputs.attention_mask:
            return True
        if isinstance(at, Node) and not state.sizes.follows_length(at):
            continue
        todo += at.all_input_nodes if isinstance(at, Node) else []
    return False


def _argument(node: Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else ()


def _erase(state: Rewrite, node: Node) -> None:
    """Remove what nothing reads any more, from a node upwards."""
    todo = [node]
    while todo:
        at = todo.pop()
        if at.users or at.op != "call_function" or at not in state.level:
            continue
        todo += at.all_input_nodes
        state.graph.erase_node(at)
        del state.level[at]
