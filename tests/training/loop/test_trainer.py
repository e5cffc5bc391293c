"""`PruneTrainer` on tiny models: phases, plans, heads, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import collate, rows, trainer
from torch import Tensor

import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.cost.plans import PlanCosts
from prunepass.errors import DataError, OptionError, PlanError
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer
from prunepass.training.methods.calibrate import Calibration
from prunepass.training.methods.graphs import Tap, TrainingGraphs

#: by default one for each way to find a plan; all of them with the slow tests
METHODS: list[dict[str, Any]] = [
    {"method": "both", "search": "measure", "freeze_model": True},
    {"method": "both", "search": "gates"},
    {"method": "both", "search": "spread", "restore": "zeros"},
    {"method": "both", "task_weight": 0.5, "ranking_loss": "ndcg2"},
    {"method": "both", "signal": "saliency"},
    {"method": "top"},
    {"method": "sdtp"},
    {"method": "sdtp", "freeze_model": True, "noise": 0.5},
]


def losses(made: PruneTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(o, id="-".join(str(v) for v in o.values()), marks=() if i in (1, 5, 6) else pytest.mark.slow)
        for i, o in enumerate(METHODS)
    ],
)
def test_every_method_ends_with_a_plan_within_the_budget_that_deploys_as_trained(
    options: dict[str, Any], tmp_path: Path
) -> None:
    made = trainer(tmp_path, **options)
    model = made.student.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made.train()
    assert all(torch.isfinite(torch.tensor(losses(made))))
    plan = made.plan
    assert plan is not None
    lengths = [len(r["input_ids"]) for r in rows()]
    assert PlanCosts.over(made.costs, lengths, plan.protect).share(plan.stages) <= 0.5
    moved = any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert moved is not options.get("freeze_model", False)
    # what others get from the saved plan is what the trainer evaluates
    plan.save_pretrained(tmp_path / "plan")
    loaded = PrunePlan.from_pretrained(tmp_path / "plan")
    assert loaded == plan
    batch = collate(rows(4, seed=5))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    pruned = prunepass.prune(model.eval(), loaded, inputs)
    made.student.eval()
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, made.student(**batch)["logits"], rtol=0, atol=1e-5)
        dense = model(**inputs).logits
    assert not torch.equal(dense, pruned(**inputs).logits)


@pytest.mark.parametrize(
    "head", ["token", *(pytest.param(h, marks=pytest.mark.slow) for h in ("base", "regression", "question", "masked"))]
)
def test_any_head(head: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, head=head, steps=6, restore="last" if head == "regression" else "lens")
    made.train()
    assert torch.tensor(losses(made)).isfinite().all()
    figures = made.evaluate()
    assert figures["eval_loss"] >= 0


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deberta-v2", "modernbert", "distilbert"))]
)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    head = "causal" if name == "llama" else "sequence"
    made = trainer(tmp_path, name=name, head=head, steps=4)
    made.train()
    assert made.plan is not None


@pytest.mark.parametrize(("signal", "tau"), [("attention", 0.5), ("saliency", 0.3)])
def test_predictors_learn_the_dense_models_ranking(signal: str, tau: float, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        steps=60,
        freeze_model=True,
        gate_steps=0.0,
        signal=signal,
        data=rows(96),
        predictor_learning_rate=1e-2,
    )
    made.train()
    taus = [entry["tau_3"] for entry in made.state.log_history if "tau_3" in entry]
    assert abs(taus[0]) < 0.3
    assert sum(taus[-10:]) / 10 > tau


def test_predictors_learn_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the later token always matters more; rotary positions keep places out of the hidden states."""

    def by_place(target: Tensor, states: Sequence[Tensor], kind: str) -> list[Tensor]:
        return [torch.arange(h.shape[1]).expand(h.shape[:2]).float() for h in states]

    monkeypatch.setattr("prunepass.training.loop.teaching.saliency", by_place)
    options = {"name": "llama", "head": "causal", "steps": 40, "data": rows(96, "causal"), "method": "sdtp"}
    frozen = {"freeze_model": True, "gate_steps": 0.0, "predictor_learning_rate": 1e-2, "predictor_positions": True}
    made = trainer(tmp_path, **options, **frozen)
    made.train()
    assert [entry["tau_0"] for entry in made.state.log_history if "tau_0" in entry][-1] > 0.7
    assert made.plan is not None
    assert "stages.0.position.weight" in made.plan.weights


def test_adapting_brings_the_pruned_model_back_to_the_dense_one(tmp_path: Path) -> None:
    """Its answers, and the states of the tokens that it keeps."""
    plan = PrunePlan((Stage(1, 0.3),))
    made = trainer(tmp_path, steps=60, plan=plan, rank_steps=0.1, data=rows(96))
    made.train()
    for name, share in (("loss_distillation", 0.6), ("loss_hidden", 0.7)):
        found = [e[name] for e in made.state.log_history if "loss_adapt" in e]
        assert sum(found[-8:]) < share * sum(found[:8]), name
    assert made.plan is not None
    assert made.plan.stages == plan.stages


def test_predictors_of_a_frozen_model_learn_to_choose(tmp_path: Path) -> None:
    """From no ranking at all, by the answers alone."""
    plan = PrunePlan((Stage(1, 0.3),))
    made = trainer(
        tmp_path, steps=80, plan=plan, freeze_model=True, gate_steps=1.0, rank_weight=0.0, predictor_learning_rate=1e-2
    )
    weights = {k: v.clone() for k, v in made.student.model.state_dict().items()}
    made.train()
    found = [e["loss_distillation"] for e in made.state.log_history if "loss_select" in e]
    assert sum(found[-12:]) < 0.8 * sum(found[:12])
    assert all(torch.equal(v, weights[k]) for k, v in made.student.model.state_dict().items())


@pytest.mark.slow
def test_one_training_for_several_budgets(tmp_path: Path) -> None:
    made = trainer(tmp_path, search="measure", extra_budgets=(0.4, 0.3))
    made.train()
    lengths = [len(r["input_ids"]) for r in rows()]
    shares = [PlanCosts.over(made.costs, lengths, p.protect).share(p.stages) for p in made.plans]
    for share, budget in zip(shares, (0.5, 0.4, 0.3), strict=True):
        assert 0.9 * budget < share <= budget
    made.save_model(str(tmp_path / "out"))
    assert PrunePlan.from_pretrained(tmp_path / "out" / "budgets" / "0.3") == made.plans[2]


@pytest.mark.slow
def test_gates_come_down_to_the_budget(tmp_path: Path) -> None:
    made = trainer(tmp_path, method="top", steps=400, gate_steps=0.95, data=rows(128))
    made.train()
    shares = [e["cost_share"] for e in made.state.log_history if "cost_share" in e]
    assert shares[0] > 0.7
    assert abs(sum(shares[-20:]) / 20 - 0.5) < 0.1
    assert not any("geometric" in str(e) for e in made.state.log_history)


def test_gates_that_choose_stages_end_within_the_budget(tmp_path: Path) -> None:
    made = trainer(tmp_path, method="top", steps=40, gate_steps=0.9, share=0.7, gate_learning_rate=0.5)
    made.train()
    assert made.plan is not None
    lengths = [len(r["input_ids"]) for r in rows()]
    assert PlanCosts.over(made.costs, lengths, made.plan.protect).share(made.plan.stages) <= 0.7


def test_rows_with_nothing_to_choose_leave_gradients_finite(tmp_path: Path) -> None:
    short = [{"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1], "labels": 0} for _ in range(16)]
    made = trainer(tmp_path, method="sdtp", share=0.4, data=short + rows(16), gate_steps=0.6)
    made.train()
    assert all(bool(torch.isfinite(v).all()) for v in made.student.state_dict().values())


def test_a_fixed_plan_keeps_its_own_protection_and_restoring(tmp_path: Path) -> None:
    protect = Protect(2, last_share=Fraction(1, 10))
    plan = PrunePlan((Stage(1, 1), Stage(2, 0.5, leave="merge")), protect=protect, restore="zeros")
    made = trainer(tmp_path, plan=plan, steps=4)
    made.train()
    assert made.plan is not None
    assert (made.plan.protect, made.plan.restore) == (protect, "zeros")
    assert made.plan.stages == plan.stages[1:]


def test_without_predictors_a_fixed_plan_brings_its_scorer_and_stands_where_that_can_rank(tmp_path: Path) -> None:
    plan = PrunePlan((Stage(0, 0.7, after_attention=True), Stage(2, 0.5)), {"name": "attention", "rows": 8})
    made = trainer(tmp_path, method="top", plan=plan, steps=3)
    made.train()
    assert made.plan is not None
    assert (made.plan.stages, made.plan.scorer) == (plan.stages, plan.scorer)
    assert PruneConfig(Goal(share=0.5), method="top", plan=plan, scorer="norm").ranker.name == "norm"


def test_the_goals_plan_is_evaluated_whatever_was_drawn_and_nothing_before_there_is_one(tmp_path: Path) -> None:
    every_second = {"eval_strategy": "steps", "eval_steps": 2}
    made = trainer(tmp_path, steps=10, rank_steps=0.5, extra_budgets=(0.4, 0.3), arguments=every_second)
    seen = []
    evaluated = made.student._evaluated
    made.student._evaluated = lambda batch: seen.append(made.student.chosen) or evaluated(batch)  # type: ignore  # a method put aside
    made.train()
    assert [e["step"] for e in made.state.log_history if "eval_loss" in e] == [6, 8, 10]
    assert set(seen) == {0}


# -- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_find_the_loss_that_one_does(tmp_path: Path) -> None:
    """Each process takes half of the batch; accelerate averages the gradients."""
    script = Path(__file__).with_name("run_distributed.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    subprocess.run([sys.executable, str(script), str(one), "8"], check=True, env=environment, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(script), str(two), "4"], check=True, env=environment, timeout=300)
    alone, together = (json.loads(p.read_text()) for p in (one, two))
    assert together["processes"] == 2
    assert alone["stages"] == together["stages"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=0.02)
    assert together["norm"] == pytest.approx(alone["norm"], rel=1e-3)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataset is empty"):
        PruneTrainer(zoo.tiny("bert", "sequence").float(), _config(), data_collator=collate, train_dataset=[])
    with pytest.raises(OptionError, match="gradient_checkpointing"):
        trainer(tmp_path, arguments={"gradient_checkpointing": True})
    with pytest.raises(OptionError, match="no method 'topp'"):
        trainer(tmp_path, method="topp")
    with pytest.raises(OptionError, match="with a frozen model"):
        trainer(tmp_path, method="top", freeze_model=True)
    with pytest.raises(OptionError, match="leave predictor_positions out"):
        trainer(tmp_path, method="top", predictor_positions=True)
    with pytest.raises(OptionError, match="cannot be met"):
        trainer(tmp_path, share=0.01, steps=4, method="both", search="spread").train()
    with pytest.raises(PlanError, match="after the attention of block 0"):
        trainer(tmp_path, plan=PrunePlan((Stage(0, 0.5, after_attention=True),)), steps=2).train()
    with pytest.raises(OptionError, match="The plan must be a PrunePlan"):
        trainer(tmp_path, plan="folder")
    with pytest.raises(OptionError, match="no scorer 'likness'"):
        trainer(tmp_path, method="top", scorer={"name": "likness"})
    with pytest.raises(OptionError, match="float32"):
        trainer(tmp_path, model=zoo.tiny("bert", "sequence").bfloat16())
    with pytest.raises(OptionError, match=r"LatencyTable\.measure"):
        PruneTrainer(
            zoo.tiny("bert", "sequence").float(),
            PruneConfig(Goal(latency_ms=5, target="openvino")),
            data_collator=collate,
            train_dataset=rows(4),
        )
    wider = zoo.tiny("bert", "sequence", num_hidden_layers=3).float()
    with pytest.raises(OptionError, match="must be of one shape"):
        trainer(tmp_path, steps=1, teacher=wider).train()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"method": "sdtp", "rank_steps": 0.2, "gate_steps": 0.3}, "RRSSSAAAAA"),
        ({"rank_steps": 0.2}, "RRAAAAAAAA"),
        ({"method": "top", "search": "spread"}, "AAAAAAAAAA"),
        ({"freeze_model": True, "gate_steps": 0.4}, "RRRRRRSSSS"),
    ],
    ids=["sdtp", "both", "top", "frozen"],
)
def test_phases_follow_the_configuration(options: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, **options)
    seen = []
    forward = made.student.forward

    def noted(**batch: Any) -> dict[str, Any]:
        seen.append(made.student.phase)
        return forward(**batch)

    made.student.forward = noted  # type: ignore[method-assign]
    made.train()
    assert "".join(phase.name[0] for phase in seen) == wanted


def _config() -> Any:
    return PruneConfig(Goal(share=0.5))


def test_states_are_not_compared_with_another_models(tmp_path: Path) -> None:
    teacher = zoo.tiny("bert", "sequence").float()
    torch.manual_seed(5)
    for parameter in teacher.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    made = trainer(tmp_path, steps=6, teacher=teacher, plan=PrunePlan((Stage(1, 0.3),)), rank_steps=0.2)
    made.train()
    assert any("loss_adapt" in entry for entry in made.state.log_history)
    assert not any("loss_hidden" in entry for entry in made.state.log_history)


def test_the_ranking_is_logged_while_the_model_adapts(tmp_path: Path) -> None:
    """Saliency is looked at in one step of four, and in each that is logged."""
    made = trainer(
        tmp_path, steps=20, plan=PrunePlan((Stage(1, 0.3),)), rank_steps=0.1, arguments={"logging_steps": 10}
    )
    made.train()
    assert "tau_1" in next(entry for entry in reversed(made.state.log_history) if "loss_adapt" in entry)


def test_layers_are_searched_for_on_calibration_rows(tmp_path: Path) -> None:
    own = [{**row, "input_ids": row["input_ids"][:6], "attention_mask": [1] * 6} for row in rows(16)]
    made = trainer(tmp_path, search="measure", calibration=own, freeze_model=True, steps=4)
    assert max(batch["attention_mask"].sum(1).max() for batch in made.calibration_batches()) == 6
    made.train()
    assert made.plan is not None
    prices = PlanCosts.over(made.costs, [6] * 16, made.plan.protect)
    assert 0.3 < prices.share(made.plan.stages) <= 0.5
    with pytest.raises(DataError, match="calibration_dataset is empty"):
        trainer(tmp_path, calibration=[])


def test_calibration_rows_are_bounded_in_number_and_in_tokens(tmp_path: Path) -> None:
    def count(**options: Any) -> int:
        made = trainer(tmp_path, calibration=rows(64), **options)
        return sum(len(batch["input_ids"]) for batch in made.calibration_batches())

    shortest, longest = (f(len(row["input_ids"]) for row in rows(64)) for f in (min, max))
    assert count(calibration_rows=500) == 64
    assert count(calibration_rows=9) == 9
    assert 100 // longest <= count(calibration_rows=64, calibration_tokens=100) <= 100 // shortest
    assert count(calibration_tokens=1) == 1


def test_rows_without_labels_have_a_loss_too_and_an_evaluation_leaves_no_states_in_memory(tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in rows(16)]
    made = trainer(tmp_path, steps=4, plan=PrunePlan((Stage(1, 0.3),)), data=bare)
    made.train()
    assert made.evaluate(bare)["eval_loss"] > 0  # type: ignore[arg-type]  # a list will do as a data set
    for module in (made.student.forms.teacher().module, made.student.pruned(made.student.plans[0]).module):
        taps = [tap for tap in module.modules() if isinstance(tap, Tap)]
        assert taps
        assert all(tap.value is None for tap in taps)


def test_a_beginning_that_a_search_protects_is_the_plans_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And reaches graphs, files and checkpoints; the configuration's protection stays as it was."""
    loss = Calibration.loss

    def kinder(self: Calibration, module: Any) -> float:
        return loss(self, module) - 10 * (module_protects[-1] == 4)

    module_protects = []
    pruned = TrainingGraphs.pruned

    def noted(self: TrainingGraphs, plan: PrunePlan, *args: Any) -> Any:
        module_protects.append(plan.protect.first)
        return pruned(self, plan, *args)

    monkeypatch.setattr(Calibration, "loss", kinder)
    monkeypatch.setattr(TrainingGraphs, "pruned", noted)
    options = {"search": "measure", "max_evaluations": 24, "beginnings": (4,)}
    made = trainer(tmp_path, steps=6, arguments={"save_strategy": "steps", "save_steps": 5}, **options)
    made.train()
    assert made.plan is not None
    assert made.plan.protect == Protect(first=4)
    assert made.student.settings.protect == Protect()
    assert PrunePlan.from_pretrained(tmp_path / "checkpoint-5").protect == Protect(first=4)
    monkeypatch.undo()  # or it could find the same anew
    again = trainer(tmp_path, steps=6, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.plan is not None
    assert again.plan.protect == Protect(first=4)
    bare = made.student.plans[0]
    assert made.student.pruned(bare) is not made.student.pruned(made.student.plan_of(bare.stages))
    with pytest.raises(OptionError, match="beginnings are whole numbers"):
        PruneConfig(Goal(share=0.5), beginnings=(0.5,))  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("method", ["top", "sdtp"])
def test_the_papers_methods_have_no_losses_but_their_own(method: str) -> None:
    assert PruneConfig(Goal(share=0.5), method=method).likens_by == 0
    assert PruneConfig(Goal(share=0.5), method=method, hidden_weight=2.0).likens_by == 2


def test_half_of_the_steps_train_the_goals_plan(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=120, rank_steps=0.0, extra_budgets=(0.4, 0.3))
    chosen = []
    made.student.forward = lambda **batch: (  # type: ignore[method-assign]  # what a step costs is of no matter here
        chosen.append(made.student.chosen) or {"loss": next(made.student.parameters()).sum() * 0}
    )
    made.train()
    counts = [chosen.count(i) for i in range(3)]
    assert sum(counts) == 120
    assert 45 <= counts[0] <= 75
    assert min(counts[1:]) >= 15
