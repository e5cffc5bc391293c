"""`Protect.only_ids`: which tokens may leave."""

from __future__ import annotations

from typing import Any

import pytest

from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PlanError
from prunepass.plan.choice import choose


@pytest.mark.parametrize("given", [(7,), [7], (7, 9), "any", ()])
def test_a_plan_comes_back_from_its_json(given: Any) -> None:
    plan = PrunePlan([Stage(1, 0.5)], "norm", Protect(only_ids=given))
    assert PrunePlan.from_json(plan.to_json()) == plan
    assert plan.protect.only_ids == (given if given == "any" else tuple(given))
    assert plan.protect.restricts == (given not in ("any", ()))


def test_plans_without_it_stay_as_they_were() -> None:
    assert "only_ids" not in Protect().to_dict()
    assert repr(Protect()) == "Protect()"
    assert repr(Protect(only_ids=[7])) == "Protect(only_ids=(7,))"
    assert Protect(only_ids="any").to_dict()["only_ids"] == "any"


def test_the_short_form() -> None:
    choice = choose({"keep": 0.5, "layers": [2], "scorer": "prompt", "protect": {"only_ids": [7]}})
    assert choice.plan.completed(PrunePlan(())).protect == Protect(only_ids=(7,))


@pytest.mark.parametrize("given", ["all", 7, [-1], [1.5], {7}, None])
def test_what_names_no_tokens(given: Any) -> None:
    with pytest.raises(PlanError, match=r"Protect\.only_ids must be"):
        Protect(only_ids=given)
