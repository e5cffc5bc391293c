"""Runtimes that hold copies of the weights use the model's own at each call, however they were changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runtimes import CONFIG, OFFLINE, assert_same, bert, text
from torch import Tensor, nn

from prunepass import PrunePlan, Stage
from prunepass.backends._offline import OfflineGraph

PLANS = [PrunePlan(stages=[Stage(layer=1, keep=0.5)]), PrunePlan(stages=[Stage(layer=2, keep=0.25)])]


def compiled(model: nn.Module, target: str, plan: PrunePlan) -> Any:
    options = {"plan": plan, "target": target, "config": CONFIG.get(target, {})}
    return torch.compile(model, backend="tokprune", options=options)


@pytest.mark.parametrize("target", OFFLINE)
@torch.no_grad()
def test_changes_through_data_and_two_plans(target: str) -> None:
    model, inputs = bert(num_layers=3), text(2, 9)

    def check(fast: Any, plan: PrunePlan) -> None:
        assert_same(fast(**inputs), compiled(copy.deepcopy(model), "eager", plan)(**inputs))

    first = compiled(model, target, PLANS[0])
    check(first, PLANS[0])
    model.encoder.layer[1].attention.self.query.weight.data.mul_(3)
    model.encoder.layer[0].output.dense.weight.data.mul_(3)
    check(first, PLANS[0])
    second = compiled(model, target, PLANS[1])
    check(second, PLANS[1])
    check(first, PLANS[0])


class _Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


def _copying(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
    """A runtime that computes with the weights that it was built with."""

    def build(program: Any) -> Any:
        held = copy.deepcopy(program).module()
        return lambda tensors: [t.clone() for t in held(*tensors)]

    return OfflineGraph(gm, example_inputs, build, "copying")


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 64), (2, 3, 4)])
@torch.no_grad()
def test_each_way_to_change_a_weight(shape: tuple[int, ...]) -> None:
    model, x = _Scale(*shape), torch.ones(2)
    fast = torch.compile(model, backend=_copying)

    def check() -> None:
        torch.testing.assert_close(fast(x), model(x))

    check()
    model.weight.data.mul_(3)
    check()
    model.weight.data = torch.randn(*shape[::-1]).permute(*range(len(shape))[::-1])  # other strides
    check()
    model.weight.data.add_(1)
    check()
    model.load_state_dict(_Scale(*shape).state_dict())
    check()
    model.weight.sub_(0.5)
    check()
    model.to(torch.bfloat16).to(torch.float32)
    check()


@torch.no_grad()
def test_memory_that_is_used_again_is_not_taken_for_the_old_weights() -> None:
    model, x = _Scale(64, 64), torch.ones(2)
    fast = torch.compile(model, backend=_copying)
    for value in range(6):
        model.weight.data = torch.full((64, 64), 1.0)
        model.weight.data[5, 7] = value  # nothing of it shows in a few elements
        torch.testing.assert_close(fast(x), model(x))
