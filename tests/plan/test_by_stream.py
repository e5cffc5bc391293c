"""Mappings of streams to plans: told from the mapping of one plan, and read."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import vision
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError, PlanError
from prunepass.plan.by_stream import plans_by_stream
from prunepass.plan.choice import choose, names_streams

PLAN = PrunePlan([Stage(1, 0.5)])


@pytest.mark.parametrize(
    ("given", "streams"),
    [
        ({"vision_tower": PLAN}, True),
        ({"vision_tower": {"keep": 0.5, "layers": [1]}, "language_model": "default"}, True),
        ({"vision_tower": [PLAN, PLAN]}, True),
        ({"keep": 0.5, "layers": [1]}, False),
        ({"keep": 0.5, "layers": [1], "scorer": "norm"}, False),
        ({"stages": [{"layer": 1, "keep": 0.5}]}, False),
        ({"scorer": "norm", "protect": {"first": 1}}, False),
        ({"keeps": 0.5, "layer": [1]}, False),
        ({}, False),
        (PLAN, False),
        (None, False),
    ],
)
def test_which_mappings_are_of_streams(given: Any, streams: bool) -> None:
    assert names_streams(given) is streams


def test_names_are_paths_or_their_ends() -> None:
    model = vision.tiny("llava")
    short = {"vision_tower": PLAN, "language_model": "default"}
    for given in (short, {f"model.{name}": plan for name, plan in short.items()}):
        found = plans_by_stream(given, model)
        assert found.language is not None
        assert list(found.towers) == ["model.vision_tower"]
        assert found.towers["model.vision_tower"].plan == PLAN
    assert plans_by_stream({"vision_tower": PLAN}, model).language is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tower": PLAN}, r"'tower' names no module of LlavaForConditionalGeneration.* model\.vision_tower"),
        ({"encoder.layers": PLAN, "mlp": PLAN}, r"'mlp' names \d+ modules, "),
        ({"vision_tower": PLAN, "model.vision_tower": PLAN}, "are of one module"),
        ({"model": PLAN}, r"'model' holds, or stands in, the language model of Llava.*, 'model\.language_model'"),
        ({"language_model.layers": PLAN}, "holds, or stands in, the language model"),
        ({"vision_tower": PLAN, "vision_tower.encoder": PLAN}, "of which one holds the other"),
        ({"vision_tower": PrunePlan([Stage(1, 0.5)], stream="encoder")}, "says stream='encoder' itself"),
        ({"vision_tower": PrunePlan([Stage(1, 0.5)], restore="none")}, "says restore='none'"),
    ],
)
def test_what_cannot_be(given: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plans_by_stream(given, vision.tiny("llava"))


def test_a_list_for_one_part() -> None:
    with pytest.raises(OptionError, match="several plans for 'vision_tower'"):
        plans_by_stream({"vision_tower": [PLAN, PLAN]}, vision.tiny("llava"))


@pytest.mark.parametrize("model", [zoo.tiny("llama", "causal"), nn.Linear(2, 2)])
def test_other_models(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"{type(model).__name__} is no vision-language model"):
        plans_by_stream({"vision_tower": PLAN}, model)


def test_where_one_plan_is_taken() -> None:
    with pytest.raises(PlanError, match="gives a plan to each of 'vision_tower', 'language_model'"):
        choose({"vision_tower": PLAN, "language_model": PLAN})
