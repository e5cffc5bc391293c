"""Expected cost of a pruned model, and the constraint that brings it to a budget (CoFi, ACL 2022; ToP, KDD 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from prunepass.cost.model import CostModel
from prunepass.errors import OptionError

__all__ = ["Constraint", "expected_cost"]


def expected_cost(
    keeps: Tensor,
    lengths: Tensor,
    layers: Sequence[int],
    costs: CostModel,
    *,
    stages: Tensor | None = None,
    minimum: int = 1,
) -> Tensor:
    """Mean over the batch of cost(pruned) / cost(dense), each row at its true length; differentiable in the keeps.

    The cost is taken at the expected number of tokens, as in ToP: a little below the expected cost, which grows faster
    than the length. Sites stand before blocks; sites between attention and feed-forward part are not covered.

    Args:
        keeps: [sites] floating, expected share of the row's original tokens behind each site; never rising.
        lengths: [B], live tokens of each row, at least 1.
        layers: the block that each site stands before, ascending.
        costs: FLOPs or seconds; only their ratio matters.
        stages: [sites], probability that there is a stage at each site, by which its own cost counts; None leaves the
            cost of scoring and selecting out.
        minimum: tokens that stay in any case (the protected ones).

    Returns:
        Scalar in the dtype of the keeps.
    """
    _check_sites(keeps, layers, costs.num_blocks)
    dense = lengths.to(keeps.dtype)
    left, whole, cost = dense, costs.rest(dense), costs.rest(dense)
    site_of = {layer: site for site, layer in enumerate(layers)}
    for block in range(costs.num_blocks):
        site = site_of.get(block)
        if site is not None:
            if stages is not None:
                cost = cost + stages[site] * costs.stage(left)
            left = torch.minimum(dense, (keeps[site] * dense).clamp(min=minimum))
        cost = cost + costs.at(block, left)
        whole = whole + costs.at(block, dense)
    return (cost / whole).mean()


class Constraint(nn.Module):
    """Lagrangian that holds a cost share at a target: ``l1 (c - t) + l2 (c - t)^2``, to be added to the loss.

    Both multipliers start at 0 and go *up* their gradient: it is turned round on its way back, so one optimiser
    minimises the loss over everything else and maximises it over them. Keep them out of weight decay. ToP writes the
    same in sparsities 1 - c and 1 - t. The target falls linearly from the dense cost to the budget and then stays.

    Args:
        budget: cost share in (0, 1) to end at.
        warmup: share of the training in [0, 1] over which the target falls; 0 asks for the budget at once.
    """

    def __init__(self, budget: float, *, warmup: float = 0.5) -> None:
        super().__init__()
        if not 0 < budget < 1:
            raise OptionError(
                f"The budget is the share of the dense model's cost that may remain, between 0 and 1; {budget} is not."
            )
        if not 0 <= warmup <= 1:
            raise OptionError(f"The warm-up is a share of the training, between 0 and 1; {warmup} is not.")
        self.budget, self.warmup = budget, warmup
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def target(self, progress: float) -> float:
        """Cost share asked for at ``progress``, the share of the training that is done, in [0, 1]."""
        if progress >= self.warmup:
            return self.budget
        return 1 - (1 - self.budget) * max(0.0, progress) / self.warmup

    def forward(self, cost: Tensor, progress: float) -> Tensor:
        """Scalar penalty of a cost share (a scalar, as of `expected_cost`) at ``progress`` in [0, 1]."""
        over = cost - self.target(progress)
        penalty: Tensor = _ascend(self.linear) * over + _ascend(self.quadratic) * over.square()
        return penalty


def _ascend(value: Tensor) -> Tensor:
    """The value itself, with its gradient turned round."""
    return 2 * value.detach() - value


def _check_sites(keeps: Tensor, layers: Sequence[int], num_blocks: int) -> None:
    ordered = all(a < b for a, b in pairwise(layers))
    if keeps.shape == (len(layers),) and ordered and all(0 <= layer < num_blocks for layer in layers):
        return
    raise OptionError(
        f"Each site needs one keep and a block of its own, ascending, among blocks 0 to {num_blocks - 1}; got keeps of "
        f"shape {tuple(keeps.shape)} for sites before blocks {list(layers)}."
    )
