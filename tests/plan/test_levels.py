"""Several plans joined to one program's stages: the shares of each level, and what plans must have in common."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from runtimes import predictor

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import OptionError, PlanError
from prunepass.plan.choice import choose
from prunepass.plan.draft import Several
from prunepass.plan.levels import Levels, chosen_level


def norm(*stages: Stage, **options: object) -> PrunePlan:
    return PrunePlan(stages, "norm", **options)  # type: ignore[arg-type]  # of PrunePlan


def test_stages_of_all_plans_and_the_share_of_each_level() -> None:
    levels = Levels.of([norm(Stage(1, 0.6), Stage(3, 0.3)), norm(Stage(2, 0.5)), norm(Stage(1, 1), Stage(3, 0.4))])
    assert [(s.layer, s.keep) for s in levels.plan.stages] == [
        (1, Fraction(3, 5)),
        (2, Fraction(1, 2)),
        (3, Fraction(3, 10)),
    ]
    tenths = [[int(share * 10) for share in row] for row in levels.shares()]
    assert tenths == [[10, 10, 10], [6, 6, 3], [10, 5, 5], [10, 10, 4]]
    assert levels.at(0).stages == ()
    assert levels.at(2) is levels.plans[1]


def test_weights_that_are_alike_stand_once() -> None:
    one, two = predictor(0, 2), predictor(1)
    plans = [
        PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "mlp", weights=one),
        PrunePlan([Stage(1, 0.8)], "mlp", weights=two),
        PrunePlan([Stage(1, 0.5)], "mlp", weights={k: v for k, v in one.items() if k.startswith("stages.0.")}),
    ]
    levels = Levels.of(plans)
    sets, which = levels.weights_of(0)
    assert which == [0, 0, 1, 0]
    assert torch.equal(sets[1]["fc1.weight"], two["stages.0.fc1.weight"])
    assert len(levels.weights_of(1)[0]) == 1
    assert torch.equal(levels.plan.weights["stages.1.fc2.bias"], one["stages.1.fc2.bias"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (norm(Stage(1, 0.5), protect=Protect(first=2)), "differ in protect"),
        (norm(Stage(1, 0.5), restore="mean"), "differ in restore"),
        (norm(Stage(1, 0.5), stream="decoder"), "differ in stream"),
        (norm(Stage(1, 0.5, leave="merge")), "differ in how tokens leave before block 1"),
        (PrunePlan([Stage(1, 0.5)], "random"), "score tokens differently before block 1: norm and random"),
        (norm(Stage(1, 0.5, {"name": "random", "seed": 7})), "score tokens differently before block 1"),
    ],
)
def test_what_one_program_has_once_must_agree(other: PrunePlan, said: str) -> None:
    with pytest.raises(PlanError, match=rf"The plans {said}.*or export a folder for each\."):
        Levels.of([norm(Stage(1, 0.6)), other])


def test_predictors_of_other_shapes_are_refused() -> None:
    plans = [PrunePlan([Stage(1, 0.6)], "mlp", weights=predictor(0, positions=p)) for p in (False, True)]
    with pytest.raises(PlanError, match="have predictors of different shapes before block 1"):
        Levels.of(plans).weights_of(0)


def test_plans_that_keep_all_leave_nothing_to_choose() -> None:
    with pytest.raises(PlanError, match="None of the plans leaves a token out"):
        Levels.of([norm(), norm(Stage(1, 1))])


def test_a_list_of_whatever_stands_for_a_plan() -> None:
    found = choose([norm(Stage(1, 0.5)), "default", {"keep": 0.5, "layers": [2]}]).plan
    assert isinstance(found, Several)
    assert len(found.plans) == 3
    with pytest.raises(PlanError, match="The list of plans is empty"):
        choose([])


def test_a_level_holds_inside_its_block_alone() -> None:
    assert chosen_level(2) == 1
    with prunepass.level(2):
        assert chosen_level(2) == 2
        with prunepass.level(0):
            assert chosen_level(2) == 0
        assert chosen_level(2, given=1) == 1
        with pytest.raises(OptionError, match=r"There is no level=2: choose 0 \(all tokens\) or 1 \(the plan\)"):
            chosen_level(1)
    assert chosen_level(2) == 1
    for number in (np.int64(2), torch.tensor([2])):
        assert chosen_level(2, number) == 2
    for wrong in (-1, True, 1.0, "2"):
        with pytest.raises(OptionError, match="whole number of at least 0"), prunepass.level(wrong):  # type: ignore[arg-type]  # refused
            pass
