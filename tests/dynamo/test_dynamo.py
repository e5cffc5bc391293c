"""torch.compile(backend="tokprune"): its options, its targets, what it refuses, and what it falls back on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import CONFIG, OFFLINE, POSITIONS, SIZES, assert_same, bert, predictor, text
from torch import Tensor, nn

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.backends._offline import OfflineGraph
from prunepass.dynamo.backend import Options, compilations
from prunepass.errors import OptionError, PlanError, PruneError, RefusalError
from prunepass.plan.choice import choose
from prunepass.plan.draft import Draft, Planned

PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)])
COMPILED = [*OFFLINE, pytest.param("inductor", marks=pytest.mark.slow)]
SLOWER = ("onnxruntime", "inductor")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: nn.Module, target: str = "eager", *, dynamic: bool | None = None, **options: Any) -> Any:
    options = {"plan": PLAN} | options if "keep" not in options else options
    settings = {"target": target, "config": CONFIG.get(target, {}), **options}
    return torch.compile(model, backend="tokprune", options=settings, dynamic=dynamic)


def first_error(fast: Any, **inputs: Tensor) -> Exception:
    """What the backend raised, out of Dynamo's wrapping."""
    with pytest.raises(Exception, match="tokprune") as caught, torch.no_grad():
        fast(**inputs or text(2, 9))
    inner = caught.value.inner_exception
    assert str(inner) in str(caught.value)
    return inner


def planned(options: dict[str, Any] | None) -> Planned:
    """The plan that torch.compile would take, as far as options say."""
    settings = Options.parse(options)
    return choose(settings.plan, None, settings.short).plan


class TestValues:
    @pytest.mark.parametrize(
        "dynamic", [None, pytest.param(True, marks=pytest.mark.slow)], ids=["automatic", "dynamic"]
    )
    def test_eager_agrees_with_prune(self, dynamic: bool | None) -> None:
        model = bert()
        reference = prunepass.prune(model, PLAN, text(2, 9))
        fast = compiled(model, dynamic=dynamic)
        with torch.no_grad():
            for size in SIZES:
                assert_same(fast(**text(*size)), reference(**text(*size)), within=1e-5)
            pruned, dense = fast(**text(4, 30)), model(**text(4, 30))
        assert (pruned.pooler_output - dense.pooler_output).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "dynamic", [None, pytest.param(True, marks=pytest.mark.slow)], ids=["automatic", "dynamic"]
    )
    @pytest.mark.parametrize("target", COMPILED)
    def test_targets_agree_with_eager(self, target: str, dynamic: bool | None) -> None:
        model = bert()
        fast, reference = compiled(model, target, dynamic=dynamic), prunepass.prune(model, PLAN, text(2, 9))
        with torch.no_grad():
            for size in SIZES:
                assert_same(fast(**text(*size)), reference(**text(*size)))

    @pytest.mark.parametrize(
        "target", ["eager", "openvino", *(pytest.param(t, marks=pytest.mark.slow) for t in SLOWER)]
    )
    def test_a_stage_that_keeps_one_token_at_first(self, target: str) -> None:
        """A size of one must not be taken for a constant."""
        model, plan = bert(), PrunePlan([Stage(1, 0.5), Stage(2, 0.05)])
        fast, reference = compiled(model, target, dynamic=True, plan=plan), prunepass.prune(model, plan, text(2, 30))
        with torch.no_grad():
            for size in ((2, 9), (3, 21), (2, POSITIONS), (4, 12)):
                assert_same(fast(**text(*size)), reference(**text(*size)))

    def test_an_input_that_is_new_in_a_later_call(self) -> None:
        """Its length is fixed at first, which fixes those that were open: sizes that are symbols in name only."""
        model = bert()
        fast, reference = compiled(model), prunepass.prune(model, PLAN, text(2, 9))
        ids = text(2, 9)["input_ids"]
        with torch.no_grad():
            fast(input_ids=ids)
            for size in ((2, 14), (3, 11)):
                given = {**text(*size), "token_type_ids": torch.zeros(size, dtype=torch.int64)}
                assert_same(fast(**given), reference(**text(*size)), within=1e-5)

    @pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_gradients(self, target: str) -> None:
        model, twin = bert(), bert()
        compiled(model, target)(**text(2, 9)).pooler_output.square().sum().backward()
        prunepass.prune(twin, PLAN, text(2, 9))(**text(2, 9)).pooler_output.square().sum().backward()
        found = model.encoder.layer[0].output.dense.weight.grad
        expected = twin.encoder.layer[0].output.dense.weight.grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("target", ["eager", pytest.param("openvino", marks=pytest.mark.slow), "onnxruntime"])
    def test_a_dynamic_model_compiles_once(self, target: str) -> None:
        fast = compiled(bert(), target, dynamic=True)
        with torch.no_grad():
            for length in (9, 12, 31, POSITIONS):
                fast(**text(3, length))
        assert len(compilations()) == 1

    def test_two_plans_in_one_process(self) -> None:
        model = bert()
        plans = [PLAN, PrunePlan([Stage(2, 0.5)], protect=Protect(first=2))]
        fast = [compiled(model, plan=plan) for plan in plans]
        with torch.no_grad():
            for one, plan in zip(fast, plans, strict=True):
                assert_same(one(**text(3, 20)), prunepass.prune(model, plan, text(2, 9))(**text(3, 20)), within=1e-5)

    def test_two_plans_that_differ_in_their_weights_alone(self) -> None:
        model = bert()
        plans = [PrunePlan([Stage(1, 0.5)], scorer="mlp", weights=predictor(seed)) for seed in (0, 1)]
        fast = [compiled(model, plan=plan) for plan in plans]
        with torch.no_grad():
            results = [one(**text(3, 20)).last_hidden_state for one in fast]
            for found, plan in zip(results, plans, strict=True):
                expected = prunepass.prune(model, plan, text(2, 9))(**text(3, 20)).last_hidden_state
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(*results, atol=1e-3)

    @pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
    def test_one_session_serves_all_sizes(self, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[bool] = []
        build = OfflineGraph._build_variant

        def count(graph: OfflineGraph, args: Any, *, dynamic: bool) -> Any:
            built.append(dynamic)
            return build(graph, args, dynamic=dynamic)

        monkeypatch.setattr(OfflineGraph, "_build_variant", count)
        fast = compiled(bert(), target, dynamic=True)
        with torch.no_grad():
            for rows, length in ((3, 20), (2, 33), (4, 12), (3, 50)):
                fast(**text(rows, length))
        assert built == [True]

    @pytest.mark.parametrize("target", ["openvino", *(pytest.param(t, marks=pytest.mark.slow) for t in SLOWER)])
    def test_predictors_that_look_at_places(self, target: str) -> None:
        model, bare = bert(), predictor(stages=2)
        weights = predictor(stages=2, positions=True)
        plans = [PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "mlp", Protect(1, 2), weights=w) for w in (weights, bare)]
        fast = compiled(model, target, plan=plans[0])
        pruned, other = (prunepass.prune(model, plan, text(2, 9)) for plan in plans)
        with torch.no_grad():
            for rows, length in ((3, 20), (2, 33)):
                x = text(rows, length)
                assert_same(fast(**x), pruned(**x))
                assert not torch.allclose(pruned(**x).last_hidden_state, other(**x).last_hidden_state, atol=1e-3)


class TestOptions:
    def test_unknown_key(self) -> None:
        with pytest.raises(OptionError, match=r"'targt'.*Did you mean 'target'"):
            Options.parse({"targt": "eager"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"plan": PLAN, "keep": 0.5, "layers": [1]}, "both a plan and keep, layers.*leave out keep, layers"),
            ({"keep": 0.5}, "keep needs layers"),
            ({"layers": [1]}, "layers needs keep"),
            ({"fallback": "eager"}, "'error' or 'dense', not 'eager'"),
            ("folder", "must be a mapping"),
        ],
    )
    def test_what_cannot_be(self, options: Any, message: str) -> None:
        with pytest.raises(OptionError, match=message):
            Options.parse(options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep": 1.5, "layers": [1]}, r"\(0, 1\]"),
            ({"keep": [0.2, 0.4], "layers": [1, 2]}, "keep rises"),
            ({"plan": "/nowhere/at/all"}, "no plan at"),
            ({"plan": "{not json"}, "not valid JSON"),
        ],
    )
    def test_plans_that_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            planned(options)

    def test_every_form_of_a_plan(self, tmp_path: Path) -> None:
        PLAN.save_pretrained(tmp_path)
        for form in (PLAN, str(tmp_path), tmp_path, PLAN.to_json(), PLAN.to_dict()):
            assert planned({"plan": form}) == PLAN
        short = {"keep": ["3/5", 0.3], "layers": [1, 2], "protect": {"first": 1}, "restore": "last"}
        assert planned(short) == PLAN

    def test_no_plan_takes_the_default_one(self) -> None:
        default = PrunePlan.default(12)
        for options in (None, {"plan": "default"}):
            plan = planned(options)
            assert isinstance(plan, Draft)
            assert plan.completed(default) == default
        plan = planned({"scorer": "norm", "protect": {"last": 1}})
        assert isinstance(plan, Draft)
        changed = plan.completed(default)
        assert changed.stages == default.stages
        assert (changed.scorer.name, changed.protect) == ("norm", Protect(last=1))

    def test_the_default_plan_counts_the_blocks(self) -> None:
        model = bert(num_layers=6)
        fast = torch.compile(model, backend="tokprune", options={"target": "eager"})
        with torch.no_grad():
            fast(**text(2, 9))
        assert compilations()[0].plan is not None
        assert compilations()[0].plan.stages == PrunePlan.default(6).stages

    def test_unknown_target(self) -> None:
        error = first_error(compiled(bert(), "inductr"))
        assert isinstance(error, OptionError)
        assert "Did you mean 'inductor'" in str(error)

    def test_a_target_of_ones_own(self) -> None:
        class Target:
            graphs = 0

            def lower(self, gm: Any, example_inputs: Any, *, config: Any = None) -> Any:
                self.graphs += 1
                return gm

        target = Target()
        with torch.no_grad():
            compiled(bert(), target)(**text(2, 9))  # type: ignore[arg-type]  # an object where a name stands mostly
        assert target.graphs == 1

    def test_a_layer_that_the_model_does_not_have(self) -> None:
        assert isinstance(first_error(compiled(bert(), plan=PrunePlan([Stage(7, 0.5)]))), PlanError)

    def test_torch_finds_the_backend_by_its_entry_point(self) -> None:
        assert "tokprune" in torch._dynamo.list_backends(exclude_tags=None)


class Smooth(nn.Module):
    """A convolution over the tokens, in the place of a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden.transpose(1, 2)).transpose(1, 2)


def smooth_bert() -> nn.Module:
    """An encoder that mixes tokens by convolution in its last layer, where no token may be missing."""
    model = bert()
    model.encoder.layer[2].output.dense = Smooth(40, 32)
    return model.eval()


class TestRefusal:
    def test_says_what_stands_in_the_way(self) -> None:
        error = first_error(compiled(smooth_bert()))
        assert isinstance(error, RefusalError)
        assert "encoder.layer.2.output.dense" in str(error)

    @pytest.mark.parametrize("target", ["eager", "openvino"])
    def test_dense_on_request(self, target: str, caplog: pytest.LogCaptureFixture) -> None:
        model = smooth_bert()
        fast = compiled(model, target, fallback="dense")
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prunepass"):
            for length in (9, 9, 12):
                x = text(2, length)
                assert_same(fast(**x), model(**x))
        warnings = [r.getMessage() for r in caplog.records if r.name.startswith("prunepass")]
        assert len(warnings) == 1
        assert "runs unpruned" in warnings[0]
        assert "encoder.layer.2" in warnings[0]
        assert all(c.result is None and "encoder.layer.2" in (c.refusal or "") for c in compilations())
        assert "unpruned" in str(compilations()[0])

    def test_dense_does_not_cover_wrong_plans(self) -> None:
        fast = compiled(bert(), plan=PrunePlan([Stage(7, 0.5)]), fallback="dense")
        assert isinstance(first_error(fast), PlanError)

    def test_a_function_without_tokens(self) -> None:
        fast = torch.compile(lambda x: x.relu(), backend="tokprune", options={"plan": PLAN, "target": "eager"})
        with pytest.raises(Exception, match="tokprune") as caught:
            fast(torch.randn(3))
        assert isinstance(caught.value.inner_exception, PruneError)
