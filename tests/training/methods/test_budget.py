"""Expected cost against plain loops, and the constraint: both multipliers climb, and the target is reached."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunepass.cost.model import CostModel
from prunepass.errors import OptionError
from prunepass.training.methods.budget import Constraint, expected_cost
from prunepass.training.methods.gate_search import GateSearch
from prunepass.training.methods.gates import PruneGates


@dataclass(frozen=True)
class ToyCosts:
    """Blocks of 10 n + n^2, the later ones dearer; whole numbers wherever n is."""

    num_blocks: int = 4

    def at(self, block: int, n: Tensor) -> Tensor:
        return (block + 1) * (10 * n + n * n)

    def rest(self, n: Tensor) -> Tensor:
        return 7 * n

    def stage(self, n: Tensor) -> Tensor:
        return 3 * n


costs: CostModel = ToyCosts()
falling = st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(lambda x: sorted(x, reverse=True))
row_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def by_loops(keeps: list[float], lengths: list[int], layers: list[int], stages: list[float], minimum: int) -> float:
    shares = []
    for length in lengths:
        left, pruned, dense = float(length), 7.0 * length, 7.0 * length
        for block in range(costs.num_blocks):
            if block in layers:
                site = layers.index(block)
                pruned += stages[site] * 3 * left
                left = min(float(length), max(float(minimum), keeps[site] * length))
            pruned += (block + 1) * (10 * left + left * left)
            dense += (block + 1) * (10 * length + length * length)
        shares.append(pruned / dense)
    return sum(shares) / len(shares)


def tensor(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# -- expected cost -------------------------------------------------------------------------------------------------


@given(
    keeps=falling,
    stages=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    lengths=row_lengths,
    layers=st.sampled_from([[0, 1], [1, 3], [2, 3]]),
    minimum=st.integers(1, 3),
)
def test_cost_is_that_of_the_definition(
    keeps: list[float], stages: list[float], lengths: list[int], layers: list[int], minimum: int
) -> None:
    found = expected_cost(
        tensor(keeps), torch.tensor(lengths), layers, costs, stages=tensor(stages), minimum=minimum
    ).item()
    assert found == pytest.approx(by_loops(keeps, lengths, layers, stages, minimum), rel=1e-12)


@given(keeps=falling, lengths=row_lengths)
def test_cost_lies_between_nothing_and_dense_and_falls_with_the_keeps(keeps: list[float], lengths: list[int]) -> None:
    rows = torch.tensor(lengths)
    share = expected_cost(tensor(keeps), rows, [1, 2], costs).item()
    less = expected_cost(tensor(keeps) * 0.9, rows, [1, 2], costs).item()
    assert 0 < less <= share <= 1 + 1e-12
    assert expected_cost(tensor([1.0, 1.0]), rows, [1, 2], costs).item() == pytest.approx(1)
    assert expected_cost(tensor([]), rows, [], costs).item() == pytest.approx(1)


def test_each_row_counts_the_same_however_long() -> None:
    keeps, short, long = tensor([0.5]), torch.tensor([10]), torch.tensor([500])
    apart = [expected_cost(keeps, rows, [1], costs).item() for rows in (short, long)]
    assert expected_cost(keeps, torch.cat([short, long]), [1], costs).item() == pytest.approx(sum(apart) / 2)
    assert apart[0] > apart[1], "attention's square weighs more in long rows"


def test_cost_has_the_gradient_of_its_value() -> None:
    lengths = torch.tensor([30, 12])

    def cost(keeps: Tensor, stages: Tensor) -> Tensor:
        return expected_cost(keeps, lengths, [1, 3], costs, stages=stages)

    assert torch.autograd.gradcheck(cost, (tensor([0.6, 0.3]).requires_grad_(), tensor([0.9, 0.2]).requires_grad_()))


@pytest.mark.parametrize(
    ("keeps", "layers"), [([0.5], [1, 2]), ([0.5, 0.4], [2, 1]), ([0.5, 0.4], [1, 1]), ([0.5], [4])]
)
def test_sites_that_do_not_fit_are_refused(keeps: list[float], layers: list[int]) -> None:
    with pytest.raises(OptionError, match="blocks 0 to 3"):
        expected_cost(tensor(keeps), torch.tensor([5]), layers, costs)


# -- constraint ----------------------------------------------------------------------------------------------------


def test_penalty_is_the_lagrangian() -> None:
    constraint = Constraint(0.4, warmup=0.5).double()
    with torch.no_grad():
        constraint.linear.fill_(2.0)
        constraint.quadratic.fill_(3.0)
    cost = tensor([0.9]).squeeze().requires_grad_()
    penalty = constraint(cost, 0.25)  # half-way through the warm-up: the target is 0.7
    assert penalty.item() == pytest.approx(2 * 0.2 + 3 * 0.2**2)
    penalty.backward()
    assert cost.grad.item() == pytest.approx(2 + 2 * 3 * 0.2)
    assert constraint.linear.grad.item() == pytest.approx(-0.2), "turned round: a step down its gradient goes up"
    assert constraint.quadratic.grad.item() == pytest.approx(-(0.2**2))


@pytest.mark.parametrize(
    ("progress", "target"), [(0.0, 1.0), (0.1, 0.875), (0.4, 0.5), (0.41, 0.5), (1.0, 0.5), (-0.1, 1.0)]
)
def test_target_falls_over_the_warm_up_and_stays(progress: float, target: float) -> None:
    assert Constraint(0.5, warmup=0.4).target(progress) == pytest.approx(target)


def test_without_a_warm_up_the_budget_holds_at_once() -> None:
    assert Constraint(0.3, warmup=0).target(0.0) == 0.3


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.5, 12.0])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        Constraint(budget)


@pytest.mark.parametrize("warmup", [-0.1, 1.5])
def test_a_warm_up_that_is_no_share_is_refused(warmup: float) -> None:
    with pytest.raises(OptionError, match="warm-up"):
        Constraint(0.5, warmup=warmup)


@pytest.mark.parametrize("budget", [0.6, 0.3])
def test_one_optimiser_brings_a_cost_to_the_budget_against_the_loss(budget: float) -> None:
    """The loss asks for a cost of 1, the constraint for the budget."""
    logit, constraint = nn.Parameter(torch.tensor(3.0)), Constraint(budget)
    optimiser = torch.optim.Adam([logit, *constraint.parameters()], lr=0.05)
    steps = 600
    for step in range(steps):
        cost = torch.sigmoid(logit)
        optimiser.zero_grad()
        ((1 - cost) + constraint(cost, step / steps)).backward()
        optimiser.step()
    assert torch.sigmoid(logit).item() == pytest.approx(budget, abs=0.02)
    assert constraint.linear.item() > 0
    assert constraint.quadratic.item() > 0


def test_gates_learn_to_drop_what_matters_least() -> None:
    """The worse half of the ranking is worth nothing at either site, and the budget is met by dropping about that."""
    gates, constraint = PruneGates(2, 20, gate_init=0.0), Constraint(0.5)
    optimiser = torch.optim.Adam([*gates.parameters(), *constraint.parameters()], lr=0.05)
    length, steps, layers = 40, 400, [1, 2]
    rank, count = torch.arange(length)[None], torch.tensor([[length]])
    worth = (rank < length // 2).float()
    for step in range(steps):
        sample = gates(torch.Generator().manual_seed(step))
        lost = sum((worth * (1 - sample.mask(site, rank, count))).mean() for site in range(2))
        share = expected_cost(gates.expected_keep(), count[0], layers, costs)
        optimiser.zero_grad()
        (lost + constraint(share, step / steps)).backward()
        optimiser.step()
        gates.clamp_()
    assert expected_cost(gates.expected_keep(), count[0], layers, costs).item() == pytest.approx(0.5, abs=0.06)
    first, second = gates.keeps()
    assert first is not None
    assert second is not None
    assert 0.45 < second < first < 0.85


# -- both, as a step of training has them ----------------------------------------------------------------------------


def test_a_search_draws_once_for_all_gates_and_prices_what_they_expect() -> None:
    gates, constraint = PruneGates(2, 8), Constraint(0.5, warmup=0.0)
    search = GateSearch(gates, constraint, costs, [1, 3], minimum=2)
    assert [stage.layer for stage in search.stages] == [1, 3]
    one, other = search.new_gates()
    search.draw([one, other], torch.Generator().manual_seed(3))
    assert one.sample is other.sample is not None
    wanted = gates(torch.Generator().manual_seed(3))
    assert torch.equal(one.sample.bins, wanted.bins)
    mask = (torch.arange(9)[None] < torch.tensor([[9], [4]])).long()
    cost = search.cost({"input_ids": mask, "attention_mask": mask})
    likely = {"stages": gates.stage_probability(), "minimum": 2}
    torch.testing.assert_close(cost, expected_cost(gates.expected_keep(), mask.sum(1), [1, 3], costs, **likely))
    search.penalty(cost, progress=1.0).backward()
    assert constraint.linear.grad is not None
    torch.testing.assert_close(constraint.linear.grad, 0.5 - cost.detach())  # it goes up by how far the cost is over
    assert gates.fine.log_alpha.grad is not None
