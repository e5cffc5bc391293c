"""ToP's search: gates at all cuts choose in place of the top scores, held to a budget by a constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from prunepass.cost.model import CostModel
from prunepass.plan import Stage
from prunepass.training.data.distances import live
from prunepass.training.methods.budget import Constraint, expected_cost
from prunepass.training.methods.gates import PruneGates
from prunepass.training.methods.gating import Gate, RankGate

__all__ = ["GateSearch"]


class GateSearch:
    """Trained gates and the constraint on what they cost, as a step of training needs them.

    Args:
        gates: one site a cut.
        constraint: holds their expected cost.
        costs: FLOPs or seconds; only their ratio matters.
        cuts: the blocks that the sites stand before, ascending.
        minimum: tokens of a row that stay in any case.
    """

    def __init__(
        self, gates: PruneGates, constraint: Constraint, costs: CostModel, cuts: Sequence[int], minimum: int
    ) -> None:
        self._gates, self._constraint, self._costs = gates, constraint, costs
        self._cuts, self._minimum = tuple(cuts), minimum

    @property
    def stages(self) -> list[Stage]:
        """One at each cut; their shares say nothing, as gates choose."""
        return [Stage(cut, Fraction(1, 2)) for cut in self._cuts]

    def new_gates(self) -> list[RankGate]:
        """For a graph with `stages`."""
        return [RankGate(site) for site in range(len(self._cuts))]

    def draw(self, gates: Sequence[Gate], generator: torch.Generator | None) -> None:
        """One draw for the gates of a graph: a step's, shared by the rows of its batch.

        Args:
            generator: the same in all processes that train one model.
        """
        drawn = self._gates(generator)
        for gate in gates:
            assert isinstance(gate, RankGate)
            gate.sample = drawn

    def cost(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Scalar: the expected cost of the batch as a share of the dense model's, differentiable in the gates."""
        return expected_cost(
            self._gates.expected_keep(),
            live(batch).sum(1),
            self._cuts,
            self._costs,
            stages=self._gates.stage_probability(),
            minimum=self._minimum,
        )

    def penalty(self, cost: Tensor, progress: float) -> Tensor:
        """Scalar: what the constraint adds to the loss for `cost` at ``progress`` in [0, 1]."""
        penalty: Tensor = self._constraint(cost, progress)
        return penalty
