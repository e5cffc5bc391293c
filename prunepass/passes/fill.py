"""What stands at pruned positions behind the final norm, where one vector stands at all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.head import leaving
from prunepass.graph.trace import Operand
from prunepass.passes.state import Rewrite

__all__ = ["ONE_FOR_ALL", "fill_behind_norms", "filled", "filling"]

aten = torch.ops.aten

#: values of `PrunePlan.restore` that put one vector at all pruned positions of a row
ONE_FOR_ALL = ("mean", "zeros")


def fill_behind_norms(rewrite: Rewrite, carried: set[Node], role: str) -> int:
    """``head(norm(restore(h)))`` -> ``head(fill(norm(restore(h))))``, where norms stand between the two.

    The norm of a mean is not the mean of norms, and that of zeros need not be zeros, so what stands at pruned
    positions is written again where the head begins: before the output, a product with weights, or whatever mixes
    tokens.

    Args:
        carried: nodes that carry the restored stream there, see `graph.head.behind_norms`; the stream's end left out.

    Returns:
        The number of values that were written into.
    """
    ends = [node for node in carried if leaving(node, carried)]
    return sum(_fill(rewrite, end, carried, role) for end in sorted(ends))


def _fill(rewrite: Rewrite, node: Node, carried: set[Node], role: str) -> int:
    value = rewrite.value(node)
    if value.dim() != 3 or not value.is_floating_point() or value.shape[-1] == 1:
        return 0
    users = leaving(node, carried)
    kept = rewrite.sites[-1].kept
    assert kept is not None
    restore, gathers = rewrite.plan.restore, rewrite.mode == "gather"
    operands = [Operand(node, ("B", "S", value.shape[-1]), value.dtype, rewrite.device)]
    if gathers:
        assert kept.positions is not None
        last = f"K{len(rewrite.sites)}"
        operands.append(rewrite.operand(kept.positions, "B", last, dtype=torch.int64))
        if kept.alive is not None:
            operands.append(rewrite.operand(kept.alive, "B", last, dtype=torch.bool))
    elif kept.degree is not None:
        operands.append(rewrite.operand(kept.degree, "B", "S", dtype=torch.float32))
    else:
        assert kept.alive is not None
        operands.append(rewrite.operand(kept.alive, "B", "S", dtype=torch.bool))

    def build(hidden: Tensor, *which: Tensor) -> Tensor:
        live = _alive_of(hidden.shape[1], *which) if gathers else which[0]
        return filled(hidden, live, restore)

    key = ("fill", restore, gathers, len(operands), operands[-1].dtype)
    with rewrite.graph.inserting_after(node):
        anchor = rewrite.graph.create_node("call_function", aten.alias.default, (node,))
    with rewrite.graph.inserting_before(anchor):
        out = rewrite.inline(build, operands, stage=rewrite.sites[-1].index, role=role, key=key)
    rewrite.graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(node, out)
    return 1


def _alive_of(length: int, positions: Tensor, alive: Tensor | None = None) -> Tensor:
    """[B, S] bool from the positions [B, K] kept; surplus slots write into a column of their own, which is dropped."""
    target = positions if alive is None else torch.where(alive, positions, length)
    marks = torch.zeros_like(target[:, :1]).expand(-1, length + 1)
    return (marks.scatter(1, target, target * 0 + 1) != 0)[:, :length]


def filled(hidden: Tensor, alive: Tensor, restore: str) -> Tensor:
    """``hidden`` [B, S, D] where ``alive`` [B, S], and `filling` elsewhere; mixed of both by a degree in [0, 1]."""
    filler = filling(hidden, alive, restore)
    if alive.dtype == torch.bool:
        return torch.where(alive[..., None], hidden, filler)
    weight = alive[..., None].to(hidden.dtype)
    return weight * hidden + (1 - weight) * filler


def filling(last: Tensor, alive: Tensor | None, restore: str) -> Tensor:
    """[B, 1, D]: what stands at all positions that were pruned.

    Args:
        last: [B, K, D] or [B, S, D], the states at the end.
        alive: [B, K] or [B, S], bool or a degree: which of them count. None: all.
    """
    if restore == "zeros":
        return last.new_zeros(last.shape[0], 1, last.shape[2])
    wide = last.to(torch.promote_types(last.dtype, torch.float32))  # thousands of tokens are summed
    if alive is None:
        return wide.mean(dim=1, keepdim=True).to(last.dtype)
    weight = alive.to(wide.dtype)
    # divided before they are summed, so that no sum is large where a runtime computes in float16; a row without live
    # tokens has no mean, and gets zeros
    share = (weight / weight.sum(dim=1, keepdim=True).clamp(min=1))[..., None]
    counted = torch.where(share > 0, wide, torch.zeros_like(wide))  # a surplus slot may hold what is no number
    return (counted * share).sum(dim=1, keepdim=True).to(last.dtype)
