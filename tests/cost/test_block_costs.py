"""FLOPs of blocks: hand formulas, any architecture against the counter of the whole graph, plans against explain()."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import harness
import zoo
from prunepass import Protect, PrunePlan, Stage, explain
from prunepass.cost import CostModel, FlopCounter, PlanCosts, plan_cost, plan_share
from prunepass.cost.blocks import BlockCosts, Quadratic, block_of_nodes
from prunepass.errors import CaptureError, OptionError, PlanError, PruneError
from prunepass.graph.capture import Captured, capture_module, ensure_aten
from prunepass.pipeline import analyse
from toys import Encoder

LENGTHS = [3, 9, 20, 33, 33, 60]


def counts(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def bert() -> BlockCosts:
    return BlockCosts.of(harness.captured("bert"))


def test_a_bert_block_is_the_hand_formula(bert: BlockCosts) -> None:
    n = counts(1, 2, 7, 64)
    d, inner = zoo.HIDDEN, zoo.INTERMEDIATE
    by_hand = n * 2 * (4 * d * d + 2 * d * inner) + n * n * 4 * d
    assert bert.num_blocks == zoo.LAYERS
    for block in range(bert.num_blocks):
        torch.testing.assert_close(bert.at(block, n), by_hand)
    torch.testing.assert_close(bert.rest(n), torch.full_like(n, 2 * d * d))  # the pooler reads one token
    torch.testing.assert_close(bert.stage(n), n * n * 2 * d)  # queries by keys; the softmax is no contraction


@pytest.mark.parametrize("name", ["albert", "deberta-v2", "gpt_neox"])
def test_parts_add_up_to_the_whole_graph_at_every_length(name: str) -> None:
    source = harness.captured(name)
    costs = BlockCosts.of(source, scorer="norm")
    counter = FlopCounter(source.graph_module)
    n = counts(1, 4, 13, 50)
    whole = sum((costs.at(i, n) for i in range(costs.num_blocks)), costs.rest(n))
    assert whole.tolist() == pytest.approx([counter.total(1, int(i)) for i in n], rel=1e-12)


@pytest.mark.parametrize("scorer", ["attention", "mlp"])
def test_a_plans_share_is_that_of_the_pruned_graph(scorer: str) -> None:
    source = harness.captured("bert")
    stages = (Stage(1, "7/10"), Stage(3, "3/10"))  # type: ignore[arg-type]  # text is taken, too
    plan = PrunePlan(stages, scorer, Protect(2, 1), weights=_weights(2) if scorer == "mlp" else {})
    dense, pruned = (FlopCounter(g) for g in (source.graph_module, harness.pruned(source, plan).graph_module))
    expected = sum(pruned.total(1, n) for n in LENGTHS) / sum(dense.total(1, n) for n in LENGTHS)
    costs = BlockCosts.of(source, scorer=scorer, hidden=24)
    assert plan_share(costs, plan, LENGTHS) == pytest.approx(expected, rel=1e-9)


def _weights(stages: int, hidden: int = 24) -> dict[str, Tensor]:
    shapes = {"fc1.weight": (hidden, zoo.HIDDEN), "fc1.bias": (hidden,), "fc2.weight": (1, hidden), "fc2.bias": (1,)}
    return {f"stages.{i}.{name}": torch.randn(shape) for i in range(stages) for name, shape in shapes.items()}


def test_it_agrees_with_explain(bert: BlockCosts) -> None:
    plan = PrunePlan((Stage(1, 0.6), Stage(2, 0.4)))  # type: ignore[arg-type]
    report = explain(zoo.tiny("bert"), plan, harness.example(), lengths=LENGTHS)
    assert report.flops is not None
    dense, pruned = report.flops.dense.real_tokens, report.flops.pruned.real_tokens
    assert plan_share(bert, plan, LENGTHS) == pytest.approx(pruned / dense, rel=1e-9)
    assert plan_cost(bert, plan, LENGTHS) * len(LENGTHS) == pytest.approx(pruned, rel=1e-9)


def test_the_formula_of_a_predictor_is_what_its_graph_costs(bert: BlockCosts) -> None:
    measured = BlockCosts.of(harness.captured("bert"), scorer="mlp", hidden=24)
    assert bert.with_predictor(zoo.HIDDEN, 24).scoring == measured.scoring
    measured = BlockCosts.of(harness.captured("bert"), scorer="mlp", hidden=24, positions=True)
    assert bert.with_predictor(zoo.HIDDEN, 24, positions=True).scoring == measured.scoring


def test_reading_costs_leaves_the_graph_as_it_was() -> None:
    source = capture_module(zoo.tiny("bert"), harness.example())
    before = source.graph_module.code
    BlockCosts.of(source)
    source.graph_module.recompile()
    assert source.graph_module.code == before


def test_costs_have_gradients(bert: BlockCosts) -> None:
    n = counts(3.5, 20).requires_grad_()
    model: CostModel = bert
    torch.autograd.gradcheck(lambda x: model.at(1, x) / 1e6 + model.stage(x) / 1e6 + model.rest(x) / 1e6, (n,))


def test_a_model_of_one_block_has_costs() -> None:
    torch.manual_seed(0)
    model = Encoder(layers=1).double().eval()
    costs = BlockCosts.of(capture_module(model, harness.example()))
    assert costs.num_blocks == 1
    assert costs.scoring.square > 0


def test_flops_that_are_not_quadratic_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Captured = harness.captured("bert")
    gm = ensure_aten(source.graph_module)
    first = next(name for name, i in block_of_nodes(gm.graph, analyse(gm)[2]).items() if i == 2)
    real = FlopCounter.per_node
    cubic = lambda self, b, n: {**real(self, b, n), first: n**3}  # noqa: E731
    monkeypatch.setattr(FlopCounter, "per_node", cubic)
    with pytest.raises(CaptureError, match=r"encoder\.layer\.2 are not quadratic"):
        BlockCosts.of(source)


# -- plans on costs of one's own ---------------------------------------------------------------------------------------

UNIT = BlockCosts((Quadratic(0, 1, 0),) * 3, Quadratic(0, 0.5, 0), Quadratic(0, 0.1, 0))


def test_cost_of_a_plan_by_hand() -> None:
    plan = PrunePlan((Stage(1, 0.5), Stage(2, 0.2)))  # type: ignore[arg-type]
    # rest 5, block 0 on 10, a stage that 10 reach, block 1 on 5, a stage that 5 reach, block 2 on 2
    assert plan_cost(UNIT, plan, [10]) == pytest.approx(5 + 10 + 1 + 5 + 0.5 + 2)
    assert plan_cost(UNIT, PrunePlan(()), [10, 20]) == pytest.approx(3.5 * 15)


def test_shares_weigh_rows_by_their_cost() -> None:
    plan = PrunePlan((Stage(0, 0.5),))  # type: ignore[arg-type]
    costs = [plan_cost(UNIT, plan, [n]) for n in (1, 100)]
    assert plan_share(UNIT, plan, [1, 100]) == pytest.approx(sum(costs) / (3.5 * 101))


def test_protected_tokens_cost() -> None:
    few = PrunePlan((Stage(0, 0.1),), protect=Protect(first=4))  # type: ignore[arg-type]
    assert plan_cost(UNIT, few, [10]) == pytest.approx(5 + 1 + 3 * 4)


def test_a_stage_that_keeps_all_costs_nothing() -> None:
    assert plan_share(UNIT, PrunePlan((Stage(1, 1),)), [10]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[], [0, 3]])
def test_lengths_are_checked(lengths: list[int]) -> None:
    with pytest.raises(OptionError, match="length"):
        PlanCosts.over(UNIT, lengths)


@pytest.mark.parametrize(
    ("stage", "message"),
    [(Stage(7, 0.5), "before block 7.*3 blocks"), (Stage(1, 0.5, after_attention=True), "after the attention")],  # type: ignore[arg-type]
)
def test_stages_that_have_no_cost_are_refused(stage: Stage, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_share(UNIT, PrunePlan((stage,)), [10])


# -- SDTP ------------------------------------------------------------------------------------------------------------

# Mistral-7B: d = 4096, feed-forward 14336, 32 blocks, vocabulary 32000; (length, dense TFLOPs, pruned TFLOPs)
TABLE_2 = [
    (4096, 72.51, 47.81),
    (8192, 158.22, 102.01),
    (16384, 369.22, 229.41),
    (32768, 949.54, 560.40),
    (65536, 2743.5, 1527.0),
    (131072, 8864.5, 4678.8),
]


@pytest.mark.parametrize(("length", "dense", "pruned"), TABLE_2)
def test_sdtps_schedule_has_the_flops_of_its_table_2(length: int, dense: float, pruned: float) -> None:
    """The paper counts grouped queries in full, attention as 3 d n^2, and the embedding as a product, like the head.

    The pruned model's head is not in its figures.
    """
    d, inner, vocabulary = 4096, 14336, 32000
    block = Quadratic(0, 2 * (4 * d * d + 3 * d * inner), 3 * d)
    table = 2 * d * vocabulary
    costs = BlockCosts((block,) * 32, Quadratic(0, 2 * table, 0), Quadratic(0, 2 * (d * d + d), 0))
    headless = replace(costs, outside=Quadratic(0, table, 0))
    assert plan_cost(costs, PrunePlan(()), [length]) / 1e12 == pytest.approx(dense, rel=2e-4)
    assert plan_cost(headless, PrunePlan.sdtp(32), [length]) / 1e12 == pytest.approx(pruned, rel=1.3e-3)


def test_sdtps_schedule() -> None:
    plan = PrunePlan.sdtp(32)
    assert [s.layer for s in plan.stages] == list(range(3, 31, 3))
    assert float(plan.stages[-1].keep) == pytest.approx(0.1 + 0.9 * 0.9**10, abs=1e-4)
    assert (plan.protect.first, float(plan.protect.last_share), str(plan.scorer)) == (4, 0.1, "mlp")
    assert [s.layer for s in PrunePlan.sdtp(6).stages] == [1, 2, 3, 4, 5]
    assert [s.layer for s in PrunePlan.sdtp(6, start=2, step=3, scorer="attention").stages] == [2, 5]
    assert len(PrunePlan.sdtp(32, num_stages=5).stages) == 5


@pytest.mark.parametrize("options", [{"start": 6}, {"step": 0}, {"num_stages": 0}, {"ratio": 1}, {"local": 1}])
def test_sdtps_schedule_refuses_what_it_cannot_place(options: dict[str, int]) -> None:
    with pytest.raises(PruneError, match=r"start|ratio|keep|last_share"):
        PrunePlan.sdtp(6, **options)
