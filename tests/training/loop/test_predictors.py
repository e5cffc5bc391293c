"""Predictors at all cuts: which there are, and copies of their weights in plans."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from prunepass import PrunePlan, Stage
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.predictors import Predictors, with_weights

WIDTH = 12
PLAN = PrunePlan((Stage(1, 0.5), Stage(2, 0.3)), "mlp")


def made(**options: object) -> Predictors:
    return Predictors((0, 1, 2), WIDTH, PruneConfig(Goal(share=0.5), predictor_width=4, **options))


def test_one_before_each_cut_under_the_names_that_checkpoints_have() -> None:
    found = made()
    assert sorted({name.partition(".")[0] for name in found.state_dict()}) == ["0", "1", "2"]
    assert found.of(PLAN) == {0: found.at(1), 1: found.at(2)}
    assert {name for name, _ in found.at(1).named_parameters()} == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def test_none_where_tokens_are_ranked_by_attention() -> None:
    found = made(method="top")
    assert not found
    assert found.of(PLAN) is None


def test_lenses_have_at_most_the_rank_of_the_width_and_are_taken_over() -> None:
    found, other = made(restore="lens", lens_rank=64), made(restore="lens", lens_rank=64)
    lens = found.at(2).lens
    assert lens is not None
    assert lens.rank == WIDTH
    other.load_lenses({2: {name: value + 1 for name, value in lens.state_dict().items()}})
    assert all(torch.equal(value, lens.state_dict()[name] + 1) for name, value in other.at(2).lens.state_dict().items())


def test_a_plan_gets_copies_by_stage() -> None:
    found = made()
    plan = with_weights(PLAN, found.of(PLAN) or {})
    before = {name: value.clone() for name, value in plan.weights.items()}
    torch.testing.assert_close(before["stages.1.fc1.weight"], found.at(2).fc1.weight.detach())
    with torch.no_grad():
        found.at(2).fc1.weight.add_(1)
    assert all(torch.equal(plan.weights[name], value) for name, value in before.items())
