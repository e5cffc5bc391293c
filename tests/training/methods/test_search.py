"""Search: the dynamic programme against all schedules, fits against budgets, whole searches on made losses."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepass.cost import PlanCosts, plan_cost, plan_share
from prunepass.cost.blocks import BlockCosts, Quadratic
from prunepass.cost.latency import Conditions, LatencyTable
from prunepass.errors import OptionError, PruneError
from prunepass.plan import Protect, PrunePlan, Stage
from prunepass.training.methods.landscape import LossTable, best_schedules
from prunepass.training.methods.schedules import Budget, fit, geometric, spread
from prunepass.training.methods.search import search

BLOCKS, WIDTH = 6, 384
COSTS = BlockCosts(
    (Quadratic(0, 24 * WIDTH**2, 4 * WIDTH),) * BLOCKS, Quadratic(3e5, 0, 0), Quadratic(0, 2 * (WIDTH**2 + WIDTH), 0)
)
LENGTHS = [20 + 7 * i for i in range(70)]
MLP = PrunePlan((), "mlp")


def stages(*pairs: tuple[int, float]) -> tuple[Stage, ...]:
    return tuple(Stage(layer, Fraction(str(keep))) for layer, keep in pairs)


def keeps(plan: PrunePlan, blocks: int = BLOCKS) -> list[float]:
    found = [1.0] * blocks
    for stage in plan.stages:
        found[stage.layer :] = [float(stage.keep)] * (blocks - stage.layer)
    return found


def additive(plan: PrunePlan) -> float:
    """A loss that sums over blocks: pruning hurts early blocks most."""
    return 0.1 + sum(0.7**i * (1 - keep) ** 2 for i, keep in enumerate(keeps(plan)))


def entangled(plan: PrunePlan) -> float:
    """The same with sharp falls punished, which no additive model sees."""
    shares = [1.0, *keeps(plan)]
    return additive(plan) + sum((a - b) ** 2 for a, b in itertools.pairwise(shares))


# -- dynamic programme -------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    k, r = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 9), min_size=k * r, max_size=k * r)
    steps = st.lists(st.integers(0, 9), min_size=k * r * r, max_size=k * r * r)
    losses = torch.tensor(draw(numbers), dtype=torch.float64).reshape(k, r) - 2  # noise can make a loss fall
    return losses, torch.tensor(draw(steps), dtype=torch.float64).reshape(k, r, r), draw(st.integers(1, 25))


def brute_force(losses: torch.Tensor, costs: torch.Tensor, budget: float) -> dict[int, float]:
    """Least loss by last level, over all schedules."""
    best: dict[int, float] = {}
    for levels in itertools.combinations_with_replacement(range(losses.shape[1]), len(losses)):
        loss, cost = price(losses, costs, levels)
        if cost <= budget:
            best[levels[-1]] = min(loss, best.get(levels[-1], math.inf))
    return best


def price(losses: torch.Tensor, costs: torch.Tensor, levels: tuple[int, ...]) -> tuple[float, float]:
    before = (0, *levels)
    cost = sum(float(costs[k, before[k], level]) for k, level in enumerate(levels))
    return sum(float(losses[k, level]) for k, level in enumerate(levels)), cost


@given(problems())
def test_the_best_schedules_are_those_of_all(problem: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    losses, costs, budget = problem
    found = best_schedules(losses, costs, budget, bins=budget)
    assert {levels[-1]: loss for loss, levels in found} == brute_force(losses, costs, budget)
    assert [loss for loss, _ in found] == sorted(loss for loss, _ in found)
    for loss, levels in found:
        assert list(levels) == sorted(levels)
        assert price(losses, costs, levels)[0] == loss
        assert price(losses, costs, levels)[1] <= budget


@given(problems(), st.floats(0.3, 3))
def test_rounding_never_breaks_the_budget(problem: tuple[torch.Tensor, torch.Tensor, int], scale: float) -> None:
    losses, costs, budget = problem
    for _, levels in best_schedules(losses, costs * scale, budget, bins=50):
        assert price(losses, costs * scale, levels)[1] <= budget + 1e-6


# -- additive model ----------------------------------------------------------------------------------------------------


def table_of(loss: Callable[[PrunePlan], float], layers: range = range(1, BLOCKS)) -> LossTable:
    grid = (0.75, 0.5, 0.25, 0.1)
    losses = tuple(tuple(loss(PrunePlan(stages((layer, keep)))) for keep in grid) for layer in layers)
    return LossTable(tuple(layers), grid, losses, loss(PrunePlan(())), BLOCKS)


@pytest.mark.parametrize("loss", [additive, entangled])
def test_single_cuts_are_predicted_exactly(loss: Callable[[PrunePlan], float]) -> None:
    table = table_of(loss)
    for layer, keep in [(1, 0.75), (3, 0.1), (5, 0.5)]:
        assert table.predict(stages((layer, keep))) == pytest.approx(loss(PrunePlan(stages((layer, keep)))))
    assert table.predict(()) == pytest.approx(loss(PrunePlan(())))


def test_an_additive_loss_is_predicted_exactly() -> None:
    plan = PrunePlan(stages((1, 0.75), (2, 0.5), (4, 0.1)))
    assert table_of(additive).predict(plan.stages) == pytest.approx(additive(plan))


def test_the_table_is_linear_between_its_points_and_below() -> None:
    table = LossTable((1, 3), (0.5, 0.25), ((4.0, 6.0), (2.0, 3.0)), 0.0, 5)
    assert table.at(1, 0.75) == pytest.approx(2)
    assert table.at(2, 0.5) == pytest.approx(3)
    assert table.at(4, 0.25) == pytest.approx(1.5)
    assert table.at(1, 0.125) == pytest.approx(7)
    assert table.at(5, 0.25) == table.at(2, 1) == 0


# -- fitted schedules --------------------------------------------------------------------------------------------------


@given(share=st.floats(0.2, 0.9), layers=st.sets(st.integers(1, 5), min_size=1))
@settings(max_examples=30)
def test_spread_meets_the_budget_or_says_what_can_be_met(share: float, layers: set[int]) -> None:
    lowest = plan_share(COSTS, PrunePlan(geometric(sorted(layers), 0.0)), LENGTHS)
    if lowest > share:
        with pytest.raises(OptionError, match=re.escape(f"lowest is {lowest:.1%}")):
            spread(share, COSTS, lengths=LENGTHS, layers=sorted(layers))
        return
    found = spread(share, COSTS, lengths=LENGTHS, layers=sorted(layers))
    assert [s.layer for s in found] == sorted(layers)
    ratio = float(found[0].keep)
    assert [float(s.keep) for s in found] == pytest.approx([ratio**i for i in range(1, len(found) + 1)], abs=4e-3)
    assert 0.98 * share <= plan_share(COSTS, PrunePlan(found), LENGTHS) <= share


def test_spread_counts_protected_tokens() -> None:
    protect = Protect(first=4, last_share=Fraction(1, 10))
    found = spread(0.5, COSTS, lengths=LENGTHS, protect=protect)
    assert 0.49 <= plan_share(COSTS, PrunePlan(found, protect=protect), LENGTHS) <= 0.5


@given(
    share=st.floats(0.3, 0.9),
    keep=st.floats(0.05, 0.95),
    fixed=st.sampled_from([None, 1, 3, 5]),
)
@settings(max_examples=30)
def test_fitted_stages_stay_within_the_budget(share: float, keep: float, fixed: int | None) -> None:
    prices = PlanCosts.over(COSTS, LENGTHS)
    given_ = geometric([1, 3, 5], keep)
    found = fit(prices, given_, share, lowest=0.01, fixed=fixed)
    if found is None:
        return
    PrunePlan(found)  # keeps that fall
    assert prices.share(found) <= share
    if fixed is not None:
        assert [s.keep for s in found if s.layer == fixed] == [s.keep for s in given_ if s.layer == fixed]


def test_stages_that_drop_next_to_nothing_are_left_out() -> None:
    prices = PlanCosts.over(COSTS, LENGTHS)
    found = fit(prices, stages((1, 0.999), (2, 0.5), (3, 0.4999)), 0.5, lowest=0.01)
    assert found is not None
    assert [s.layer for s in found] == [2]


# -- whole searches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [additive, entangled])
@pytest.mark.parametrize("budget", [0.6, 0.4, 0.25])
def test_a_search_uses_its_budget_and_beats_fixed_schedules(loss: Callable[[PrunePlan], float], budget: float) -> None:
    result = search(loss, COSTS, budget, lengths=LENGTHS)
    assert 0.98 * budget <= result.share <= budget
    assert result.share == pytest.approx(plan_share(COSTS, result.plan, LENGTHS))
    assert result.loss == loss(result.plan) == min(t.loss for t in result.trials if t.stages == result.plan.stages)
    fixed = [range(1, BLOCKS), [1], [1, 3]]
    others = [spread(budget, COSTS, lengths=LENGTHS, layers=list(layers)) for layers in fixed]
    assert result.loss <= min(loss(PrunePlan(s)) for s in others) + 1e-3
    assert result.dense_loss == loss(PrunePlan(()))
    assert len(result.trials) <= 80


def test_a_search_comes_near_the_best_of_a_fine_grid() -> None:
    """Two stages, all places, keeps in steps of a hundredth: the search may use more stages but must not lose much."""
    budget, prices = 0.45, PlanCosts.over(COSTS, LENGTHS)
    best = math.inf
    for first, second in itertools.combinations(range(1, BLOCKS), 2):
        for high in range(20, 100, 4):
            found = fit(prices, stages((first, high / 100), (second, high / 200)), budget, lowest=0.01, fixed=first)
            if found:
                best = min(best, entangled(PrunePlan(found)))
    assert search(entangled, COSTS, budget, lengths=LENGTHS).loss <= 1.02 * best


def test_local_moves_help_where_the_loss_is_not_additive() -> None:
    result = search(entangled, COSTS, 0.4, lengths=LENGTHS)
    assert result.loss < min(t.loss for t in result.trials if t.step == "candidate")


def test_the_same_search_twice_gives_the_same() -> None:
    one, two = (search(entangled, COSTS, 0.4, lengths=LENGTHS) for _ in range(2))
    assert one.to_dict() == two.to_dict()


def test_every_plan_is_evaluated_once_and_no_more_than_allowed() -> None:
    seen: list[PrunePlan] = []
    steps: list[str] = []

    def loss(plan: PrunePlan) -> float:
        seen.append(plan)
        return entangled(plan)

    result = search(loss, COSTS, 0.4, lengths=LENGTHS, max_evaluations=40, on_step=steps.append)
    assert len(seen) == len(result.trials) == len(steps) <= 40
    assert len({(p.stages, p.protect) for p in seen}) == len(seen)
    assert steps[0] == "dense"


def test_a_deep_model_gets_single_cuts_at_some_layers_only() -> None:
    blocks = 24
    costs = BlockCosts(COSTS.blocks[:1] * blocks, COSTS.outside, COSTS.scoring)
    result = search(
        lambda plan: sum((1 - k) ** 2 for k in keeps(plan, blocks)), costs, 0.5, lengths=LENGTHS, max_evaluations=50
    )
    assert result.table is not None
    assert len(result.table.layers) == 5
    assert (result.table.layers[0], result.table.layers[-1]) == (1, blocks - 1)
    assert 0.49 <= result.share <= 0.5


def test_plans_carry_the_templates_scorer_protection_and_restoring() -> None:
    template = PrunePlan(stages((1, 0.5)), "norm", Protect(first=2, last=1), "zeros")
    result = search(additive, COSTS, 0.4, lengths=LENGTHS, template=template)
    plan = result.plan
    assert (plan.scorer, plan.protect, plan.restore) == (template.scorer, template.protect, "zeros")
    assert result.share == pytest.approx(plan_share(COSTS, plan, LENGTHS))


def test_scorers_that_read_no_attention_may_prune_before_the_first_block() -> None:
    assert search(additive, COSTS, 0.12, lengths=LENGTHS, template=MLP).plan.stages[0].layer == 0
    with pytest.raises(OptionError, match=r"before block 1, the lowest is 1[78]\.\d%"):
        search(additive, COSTS, 0.12, lengths=LENGTHS)


def test_pairs_whose_question_is_kept_prune_before_the_first_block_only_where_they_must() -> None:
    def early(plan: PrunePlan) -> float:
        """A loss by which the first place is as good as any."""
        return sum((1 - keep) ** 2 for keep in keeps(plan))

    pair = PrunePlan((), "mlp", Protect(segment="first"))
    assert search(early, COSTS, 0.4, lengths=LENGTHS, template=MLP).plan.stages[0].layer == 0
    result = search(early, COSTS, 0.4, lengths=LENGTHS, template=pair)
    assert result.plan.stages[0].layer == 1
    assert 0.38 <= result.share <= 0.4
    assert all(s.layer > 0 for trial in result.trials for s in trial.stages)
    assert search(early, COSTS, 0.2, lengths=LENGTHS, template=pair).plan.stages[0].layer == 0
    assert search(early, COSTS, 0.4, lengths=LENGTHS, template=pair, layers=[0]).plan.stages[0].layer == 0
    spans = search(early, COSTS, 0.4, lengths=LENGTHS, template=pair, from_embeddings=True)
    assert spans.plan.stages[0].layer == 0


def test_stages_stand_at_the_layers_allowed() -> None:
    result = search(additive, COSTS, 0.7, lengths=LENGTHS, layers=[2, 4])
    assert {s.layer for s in result.plan.stages} <= {2, 4}
    assert 0.68 <= result.share <= 0.7


def test_results_are_json() -> None:
    result = search(additive, COSTS, 0.5, lengths=LENGTHS)
    data = json.loads(json.dumps(result.to_dict()))
    assert PrunePlan.from_dict(data["plan"]) == result.plan
    assert data["unit"] == "FLOPs"
    assert data["table"]["layers"] == [1, 2, 3, 4, 5]
    assert data["trials"][0]["step"] == "dense"


# -- latency as the cost ----------------------------------------------------------------------------------------------

CONDITIONS = Conditions("Toy", "eager", "float32", "auto", 1, 1, {}, "norm", None, 3, {}, "cpu")
SECONDS = LatencyTable(
    (8, 128, 512), ((1e-3, 2e-3, 9e-3),) * BLOCKS, (1e-3, 1e-3, 1e-3), (2e-4, 3e-4, 1e-3), CONDITIONS
)


def test_a_budget_in_seconds() -> None:
    dense = plan_cost(SECONDS, PrunePlan(()), LENGTHS)
    result = search(additive, SECONDS, Budget(cost=0.6 * dense), lengths=LENGTHS)
    assert 0.59 * dense <= result.cost <= 0.6 * dense
    assert result.budget == pytest.approx(0.6)
    assert result.unit == "s"


def test_costly_stages_are_merged() -> None:
    """A stage that takes as long as two blocks: one of them is all that pays."""
    dear = LatencyTable(SECONDS.lengths, SECONDS.blocks, SECONDS.outside, (2e-3, 4e-3, 18e-3), CONDITIONS)
    cheap = search(additive, SECONDS, 0.7, lengths=LENGTHS)
    assert len(search(additive, dear, 0.7, lengths=LENGTHS).plan.stages) < len(cheap.plan.stages)


def test_an_impossible_latency_names_the_lowest_in_milliseconds() -> None:
    with pytest.raises(OptionError, match=r"0\.1 ms a row\) cannot be met.*lowest is \d+\.\d% \(\d+\.\d+ ms\)"):
        search(additive, SECONDS, Budget(cost=1e-4), lengths=LENGTHS)


def test_a_budget_that_the_dense_model_meets_prunes_nothing() -> None:
    result = search(additive, SECONDS, Budget(cost=1.0), lengths=LENGTHS)
    assert result.plan.stages == ()
    assert result.share == 1
    assert result.table is None
    assert spread(Budget(cost=1.0), SECONDS, lengths=LENGTHS) == ()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -0.2, 1.5, math.nan])
def test_shares_outside_0_and_1_are_refused(value: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        search(additive, COSTS, value, lengths=LENGTHS)


@pytest.mark.parametrize("options", [{}, {"share": 0.5, "cost": 1.0}, {"cost": 0}, {"cost": math.inf}])
def test_budgets_are_one_positive_number(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="budget"):
        Budget(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "empty"),
        ({"grid": ()}, "grid"),
        ({"grid": (0.5, 1.0)}, "grid"),
        ({"lowest": 0}, "lowest"),
        ({"layers": []}, "layers"),
        ({"layers": [2, 6]}, "blocks 0 to 5"),
        ({"max_evaluations": 5}, "at least 12"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        search(additive, COSTS, 0.5, **{"lengths": LENGTHS, **options})  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_told_with_their_plan(loss: float) -> None:
    with pytest.raises(PruneError, match=r"0\.75 before block 1 is (nan|inf)"):
        search(lambda plan: loss if plan.stages else 0.0, COSTS, 0.5, lengths=LENGTHS)


# -- beginnings of rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "found"), [(16, 16), (1, 1), (40, 32)])
def test_a_beginning_is_protected_where_that_helps(wanted: int, found: int) -> None:
    """At equal cost: what the beginning takes, the rest of the row loses."""

    def loss(plan: PrunePlan) -> float:
        return additive(plan) + 0.5 * abs(plan.protect.first - wanted) / wanted * bool(plan.stages)

    result = search(loss, COSTS, 0.4, lengths=LENGTHS, template=MLP, beginnings=(8, 16, 32, 400))
    assert result.plan.protect.first == found
    assert 0.37 <= plan_share(COSTS, result.plan, LENGTHS) == result.share <= 0.4
    assert result.loss == loss(result.plan)
    tried = {t.first for t in result.trials}
    assert {1, 8, 16, 32} <= tried
    assert 400 not in tried  # longer than most rows, so that nothing could be pruned


def test_protection_that_was_asked_for_is_never_lowered() -> None:
    template = PrunePlan((), "mlp", Protect(first=12, last=2, token_ids=(102,)))
    result = search(additive, COSTS, 0.4, lengths=LENGTHS, template=template, beginnings=(4, 8, 12))
    assert result.plan.protect == template.protect
    assert {t.first for t in result.trials} == {12}


def test_a_beginning_takes_no_room_from_tokens_protected_by_id() -> None:
    template = PrunePlan((), "mlp", Protect(token_ids=(102,)))

    def longer(plan: PrunePlan) -> float:
        return additive(plan) / plan.protect.first

    assert search(longer, COSTS, 0.4, lengths=LENGTHS, template=MLP).plan.protect.first > 1
    assert search(longer, COSTS, 0.4, lengths=LENGTHS, template=template).plan.protect == template.protect


def test_no_beginnings_are_tried_where_none_are_given() -> None:
    template = PrunePlan((), "mlp", Protect(first=12, last=2))
    result = search(additive, COSTS, 0.4, lengths=LENGTHS, template=template, beginnings=())
    assert result.plan.protect == template.protect
