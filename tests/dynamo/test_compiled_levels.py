"""torch.compile with a list of plans: each call runs by the plan that `prunepass.level` names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtimes import CONFIG, bert, text

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.dynamo.backend import Options, compilations
from prunepass.errors import OptionError

PLANS = [PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "norm"), PrunePlan([Stage(2, 0.5)], "attention")]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("target", ["eager", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
def test_each_level_is_its_plan(target: str) -> None:
    model = bert()
    options: dict[str, Any] = {"plan": PLANS, "target": target, "config": CONFIG.get(target, {})}
    fast = torch.compile(model, backend="tokprune", options=options, dynamic=True)
    x = text(3, 13)
    alone = [model, *(prunepass.prune(bert(), plan, x) for plan in PLANS)]
    with torch.no_grad():
        for number in (1, 0, 2, 1):
            with prunepass.level(number):
                found = fast(**x).last_hidden_state
            assert (found - alone[number](**x).last_hidden_state)[x["attention_mask"].bool()].abs().max() < 1e-4
        assert torch.equal(fast(**x).last_hidden_state, found)
        assert len(compilations()) == 3  # one for each level, and none again
        with pytest.raises(OptionError, match="There is no level=3"), prunepass.level(3):
            fast(**x)


def test_options_that_go_with_one_plan() -> None:
    for more in ({"decode": {"every": 64, "keep": 0.5}}, {"later_turns": True}):
        with pytest.raises(OptionError, match="goes with a single plan"):
            Options(plan=PLANS, **more)  # type: ignore[arg-type]  # of several types
