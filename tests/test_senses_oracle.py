"""Models that see or hear, pruned from their own inputs: the unmodified model with pruned tokens hidden by module hooks
gives the same outputs, to 1e-10 in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import harness
import hooks
import oracle
import prunepass
import senses
from prunepass import Protect, PrunePlan, Stage
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import prune_graph

TOLERANCE = 1e-10
PLAN = PrunePlan((Stage(1, "1/2"), Stage(3, 0.3)), "norm")
OTHERS = {
    "from the first block": PrunePlan((Stage(0, 0.7), Stage(2, "1/4")), "norm"),
    "protected at both ends": PrunePlan((Stage(2, 0.2),), "norm", protect=Protect(first=7, last=2)),
}
EVERY_DAY = ("vit", "deit", "beit", "dinov2-registers", "siglip", "wav2vec2", "ast")


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


@cache
def captured(name: str) -> Captured:
    return capture_module(senses.tiny(name), senses.example(name))


def expected(name: str, plan: PrunePlan, x: dict[str, Any]) -> Any:
    model = senses.tiny(name)
    layers = hooks.layers_of(model, senses.LAYERS)
    return hooks.run_hooked(model, layers, plan, x, live=senses.live(name, x)).output


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERY_DAY else pytest.mark.slow) for n in senses.SENSES]
)
def test_a_first_plan_agrees_with_hooks(name: str) -> None:
    result = prune_graph(captured(name).graph_module, PLAN, metadata=False)
    sense = senses.SENSES[name]
    assert result.plan.protect.first == max(1, sense.prefix), "class and register tokens stay"
    for x in (senses.example(name, 2), senses.example(name, 3, seed=1)):
        found, wanted = harness.run(result.graph_module, x), expected(name, result.plan, x)
        live = senses.live(name, x)
        assert harness.difference(found, wanted, live) < TOLERANCE
    widths = harness.attention_widths(result.graph_module, x)
    counts = [oracle.count(sense.tokens, stage.keep, result.plan.protect) for stage in result.plan.stages]
    assert [keys for _, keys in widths][:4] == [sense.tokens, counts[0], counts[0], counts[1]]
