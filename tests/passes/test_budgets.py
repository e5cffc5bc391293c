"""One graph for several plans: at each level the values of that plan alone, at level 0 those of the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes import bert, predictor, text
from torch import Tensor

import harness
import prunepass
import prunepass.pipeline as pipeline
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import ContractError, OptionError, PlanError
from prunepass.graph.analysis import Analysis
from prunepass.graph.capture import capture_module
from prunepass.graph.extra_input import add_input
from prunepass.passes.budgets import InsertBudgets, Table
from prunepass.passes.live import maximum
from prunepass.passes.state import Rewrite
from prunepass.pipeline import prune_graph
from prunepass.plan import kept_count
from prunepass.plan.counts import count_of_shares
from prunepass.plan.draft import Several
from prunepass.plan.levels import LEVEL, Levels, level_example

INPUTS = [text(3, 13), text(2, 20, 3), text(1, 5), text(1, 1)]


def difference(got: Any, wanted: Any, x: dict[str, Tensor]) -> float:
    there = x["attention_mask"].bool()
    return float((got.last_hidden_state - wanted.last_hidden_state)[there].abs().max())


def check(plans: list[PrunePlan], mode: Any = "gather") -> None:
    model, (_, single) = bert().double(), analysed()
    several = prunepass.prune(model, plans, INPUTS[0], mode=mode)
    results = [prune_graph(single.gm, plan, mode=mode, analysis=single, metadata=False) for plan in plans]
    alone = [model, *(result.graph_module for result in results)]
    for number, one in enumerate(alone):
        for x in INPUTS:
            with torch.no_grad():
                assert difference(several(**x, level=number), one(**x), x) < 1e-10, number


def mlp(*stages: Stage, seed: int = 0, **options: Any) -> PrunePlan:
    return PrunePlan(stages, "mlp", weights=predictor(seed, len(stages)), **options)


def test_stages_that_act_in_some_levels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1")
    protect = Protect(first=2, last_share=0.1, token_ids=(7,))
    check(
        [
            PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "attention", protect),
            PrunePlan([Stage(2, 0.5)], "attention", protect),
            PrunePlan([Stage(1, 1)], "attention", protect),
        ]
    )


def test_predictors_of_each_level() -> None:
    check([mlp(Stage(1, 0.6), Stage(2, 0.3)), mlp(Stage(1, 0.6), Stage(2, 0.5), seed=1), mlp(Stage(2, 0.4), seed=2)])


@pytest.mark.parametrize("restore", ["mean", "zeros"])
def test_what_pruned_positions_carry(restore: Any) -> None:
    check([PrunePlan([Stage(1, 0.6)], "norm", restore=restore), PrunePlan([Stage(2, 0.3)], "norm", restore=restore)])


def test_tokens_that_merge() -> None:
    stages = [[Stage(1, 0.6, leave="merge"), Stage(2, 0.3, leave="merge")], [Stage(2, 0.5, leave="merge")]]
    check([PrunePlan(one, "norm") for one in stages])


def test_hiding_in_place_of_gathering() -> None:
    check([PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "norm"), PrunePlan([Stage(2, 0.5)], "norm")], mode="mask")


def test_one_plan_has_two_levels_and_others_are_refused() -> None:
    model = bert().double()
    pruned = prunepass.prune(model, [PrunePlan([Stage(1, 0.5)], "norm")], INPUTS[0])
    x = INPUTS[1]
    with torch.no_grad():
        assert difference(pruned(**x), pruned(**x, level=1), x) == 0
        with prunepass.level(0):
            assert difference(pruned(**x), model(**x), x) < 1e-10
        with pytest.raises(OptionError, match="There is no level=2"):
            pruned(**x, level=2)
        single = prunepass.prune(model, PrunePlan([Stage(1, 0.5)], "norm"), INPUTS[0])
        assert difference(single(**x), pruned(**x), x) == 0
        with pytest.raises(OptionError, match="This model has one plan"):
            single(**x, level=1)
    with pytest.raises(PlanError, match="single plan"):
        pipeline.kept_tokens(model, [PrunePlan([Stage(1, 0.5)], "norm")], x)  # type: ignore[arg-type]  # on purpose


def test_a_decoder_without_padding_told() -> None:
    model = zoo.tiny("llama", "causal")
    x = {"input_ids": harness.example()["input_ids"]}
    plans = [
        PrunePlan([Stage(1, 0.5)], "norm", Protect(first=1, last=1)),
        PrunePlan([Stage(3, 0.4)], "norm", Protect(first=1, last=1)),
    ]
    several = prunepass.prune(model, plans, x)
    with torch.no_grad():
        for number, one in enumerate([model, *(prunepass.prune(model, plan, x) for plan in plans)]):
            assert (several(**x, level=number).logits - one(**x).logits).abs().max() < 1e-10


def test_an_exported_program_takes_a_level_and_the_nearest_for_one_that_there_is_not() -> None:
    program = capture_module(bert(), INPUTS[0]).exported
    plans = [PrunePlan([Stage(1, 0.5)], "norm"), PrunePlan([Stage(2, 0.4)], "norm")]
    pruned = prunepass.prune(program, plans).module(check_guards=False)
    x = INPUTS[1]
    with torch.no_grad():
        found = [pruned(**x, level=torch.tensor([number])) for number in (-3, 0, 2, 9)]
        assert difference(found[0], bert()(**x), x) < 1e-5
        assert difference(found[0], found[1], x) == 0
        assert difference(found[2], found[3], x) == 0
        assert difference(found[1], found[2], x) > 1e-3


def test_what_no_level_can_choose_in() -> None:
    plans = [PrunePlan([Stage(1, 0.5)], "norm"), PrunePlan([Stage(9, 0.5)], "norm")]
    with pytest.raises(PlanError, match="this model has 3 blocks"):
        prunepass.prune(bert(), plans, INPUTS[0])
    with pytest.raises(PlanError, match="which this graph has not"):
        prunepass.prune(capture_module(bert(), INPUTS[0]).graph_module, plans[:1])
    with pytest.raises(PlanError, match="Give a single plan here"):
        prunepass.explain(bert(), plans, INPUTS[0])


# -- the pass, broken on purpose ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoNumber(InsertBudgets):
    def run(self, state: Rewrite) -> int:
        count = super().run(state)
        site = state.sites[0]
        assert site.width is not None
        with state.graph.inserting_after(site.width):
            site.width = state.graph.call_function(torch.sym_max, (site.width, 1))
        return count


@dataclass(frozen=True)
class OfAnotherStage(InsertBudgets):
    def run(self, state: Rewrite) -> int:
        count = super().run(state)
        first, second = (site.width for site in state.sites)
        assert first is not None
        assert second is not None
        second.args[0].replace_all_uses_with(first.args[0], delete_user_cb=lambda user: user is second)  # type: ignore[union-attr]  # a node
        return count


@dataclass(frozen=True)
class TooMany(InsertBudgets):
    def run(self, state: Rewrite) -> int:
        count = super().run(state)
        site = state.sites[0]
        assert site.end is not None
        with state.graph.inserting_after(site.end):
            made = state.graph.call_function(torch.ops.aten.add.Tensor, (site.end, 1))
        made.meta = dict(site.end.meta)
        site.end = made
        return count


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoNumber, "No level says how many"),
        (OfAnotherStage, "At level 1 it is"),
        (TooMany, "At level 0 rows keep other numbers of tokens"),
    ],
)
def test_a_graph_broken_on_purpose_is_caught(
    kind: type[InsertBudgets], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "InsertBudgets", kind)
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1")
    whole, _ = analysed()
    plans = (PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "norm"),)
    with pytest.raises(ContractError, match=said) as found:
        prune_graph(whole.gm, Several(plans), analysis=whole, metadata=False)
    assert found.value.pass_name == "budgets"
    assert found.value.before[-1] == "live"


# -- for any plans ----------------------------------------------------------------------------------------------------

shares = st.fractions(Fraction(1, 100), Fraction(1), max_denominator=10_000)
plans_of_stages = st.lists(st.lists(shares, min_size=2, max_size=2), min_size=1, max_size=3)


def falling(keeps: list[list[Fraction]]) -> list[PrunePlan]:
    return [PrunePlan([Stage(1, max(k)), Stage(2, min(k))], "norm") for k in keeps]


@given(plans_of_stages, st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_counts_are_exact_whatever_the_denominators(keeps: list[list[Fraction]], n: int) -> None:
    plans = falling(keeps)
    if all(stage.keep == 1 for plan in plans for stage in plan.stages):
        return
    levels = Levels.of(plans)
    table, protect = Table.of(levels), Protect(first=2, last=1)
    found = count_of_shares(
        torch.tensor([[n]]), table.over, table.under, table.most, protect, minimum=torch.minimum, maximum=maximum
    )
    assert found.tolist() == [[kept_count(n, share, protect) for share in row] for row in levels.shares()]


@cache
def analysed() -> tuple[Analysis, Analysis]:
    """The dense graph, with and without the input that chooses."""
    graphs = [capture_module(bert().double(), INPUTS[0]).graph_module for _ in range(2)]
    add_input(graphs[0], LEVEL, level_example())
    return Analysis.of(graphs[0]), Analysis.of(graphs[1])


@given(plans_of_stages, st.integers(1, 24), st.integers(0, 100))
@settings(max_examples=5, deadline=None)
def test_each_level_is_its_plan(keeps: list[list[Fraction]], length: int, seed: int) -> None:
    plans = [plan for plan in falling(keeps) if any(stage.keep != 1 for stage in plan.stages)]
    if not plans:
        return
    whole, single = analysed()
    x = text(3, length, seed)
    several = prune_graph(whole.gm, Several(tuple(plans)), analysis=whole, metadata=False).graph_module
    with torch.no_grad():
        for number, plan in enumerate(plans, 1):
            one = prune_graph(single.gm, plan, analysis=single, metadata=False).graph_module
            assert difference(several(**x, level=torch.tensor([number])), one(**x), x) < 1e-10
