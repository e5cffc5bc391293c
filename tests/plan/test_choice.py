"""Which plan a model gets: that of its folder everywhere, the default one where none is, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runtimes import POSITIONS, bert, text
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.dynamo.backend import compilations
from prunepass.errors import ExportError, OptionError, PlanError
from prunepass.graph.analysis import Analysis
from prunepass.graph.capture import capture_module
from prunepass.passes.default_plan import SHORT_ROW, default_for
from prunepass.pipeline import prune_graph
from prunepass.plan.choice import choose, plan_folder
from prunepass.report.traced import head_warnings

PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "norm", restore="zeros")
OTHER = PrunePlan([Stage(2, 0.5)], "norm", restore="zeros")
POOLED = Protect(first=SHORT_ROW, last=1)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def saved(folder: Path, plan: PrunePlan | None, seed: int = 0) -> BertModel:
    """A model that was saved with a plan beside it, and loaded again."""
    bert(seed).save_pretrained(folder)
    if plan is not None:
        plan.save_pretrained(folder)
    return BertModel.from_pretrained(folder).eval()


class Wrapped(nn.Module):
    def __init__(self, *encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoders[0](input_ids=input_ids, attention_mask=attention_mask)[0]


def hidden(model: Any, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**x)
    return out if isinstance(out, Tensor) else out[0]


class TestFolder:
    def test_a_plan_beside_the_model_is_taken_by_every_verb(self, tmp_path: Path) -> None:
        model, x = saved(tmp_path / "pruned", PLAN), text(2, 30)
        pruned = prunepass.prune(model, None, x)
        assert pruned.plan == PLAN
        report = prunepass.explain(model, None, x)
        assert report.plan == PLAN
        assert f"plan: the plan in {tmp_path / 'pruned'}, the folder that the model was loaded from" in str(report)
        folder = prunepass.export(model, None, tmp_path / "out", to="pt2")
        assert PrunePlan.from_pretrained(folder) == PLAN
        types = {"token_type_ids": torch.zeros_like(x["input_ids"])}
        exported = torch.export.load(folder / "model.pt2").module()
        found = exported(**x, **types)["last_hidden_state"]
        torch.testing.assert_close(found, hidden(pruned, x), atol=1e-5, rtol=0)

    def test_the_default_plan_on_request(self, tmp_path: Path) -> None:
        model, x = saved(tmp_path / "pruned", PLAN), text(2, 40)
        default = prunepass.prune(bert(), None, x).plan
        assert default != PLAN
        assert prunepass.prune(model, "default", x).plan == default
        report = prunepass.explain(model, "default", x)
        assert (report.plan, report.plan_source) == (default, "the default plan, as asked for")
        folder = prunepass.export(model, "default", tmp_path / "out", to="pt2")
        assert PrunePlan.from_pretrained(folder) == default

    def test_a_plan_that_is_given_goes_before(self, tmp_path: Path) -> None:
        model = saved(tmp_path / "pruned", PLAN)
        OTHER.save_pretrained(tmp_path / "other")
        assert prunepass.prune(model, OTHER, text(2, 9)).plan == OTHER
        found = choose(tmp_path / "other", model)
        assert (found.plan, found.source) == (OTHER, f"the plan in {tmp_path / 'other'}")

    def test_parts_of_a_model(self, tmp_path: Path) -> None:
        one, two = saved(tmp_path / "one", PLAN), saved(tmp_path / "two", OTHER)
        assert plan_folder(Wrapped(one)) == tmp_path / "one"
        assert plan_folder(Wrapped(bert())) is None
        with pytest.raises(PlanError, match=r"folders that each hold a plan: .*one, .*two"):
            plan_folder(Wrapped(one, two))

    def test_a_plan_that_does_not_fit_says_where_it_is_from(self, tmp_path: Path) -> None:
        model = saved(tmp_path / "pruned", PrunePlan([Stage(7, 0.5)]))
        with pytest.raises(PlanError, match=r"3 blocks.*It is the plan in .*pruned.*plan='default'"):
            prunepass.prune(model, None, text(2, 9))

    def test_without_a_plan_export_writes_the_model_as_it_is(self, tmp_path: Path) -> None:
        folder = prunepass.export(saved(tmp_path / "dense", None), None, tmp_path / "out", to="pt2")
        assert not (folder / "prunepass.json").exists()


class TestCompile:
    def fast(self, model: Any, **options: Any) -> Any:
        return torch.compile(model, backend="tokprune", options={"target": "eager", **options})

    @pytest.mark.parametrize("way", ["compile", "method", "wrapped"])
    def test_a_plan_beside_the_model(self, way: str, tmp_path: Path) -> None:
        model, x = saved(tmp_path / "pruned", PLAN), text(2, 30)
        expected = hidden(prunepass.prune(model, PLAN, x), x)
        fast: Any = model
        if way == "method":
            model.compile(backend="tokprune", options={"target": "eager"})
        else:
            fast = self.fast(model if way == "compile" else Wrapped(model))
        torch.testing.assert_close(hidden(fast, x), expected, atol=1e-5, rtol=0)
        assert compilations()[0].plan == PLAN

    def test_the_default_plan_on_request(self, tmp_path: Path) -> None:
        model, x = saved(tmp_path / "pruned", PLAN), text(2, 40)
        hidden(self.fast(model, plan="default"), x)
        assert compilations()[0].plan == prunepass.prune(model, "default", x).plan

    @pytest.mark.parametrize("plans", [(PLAN, OTHER), (None, OTHER), (PLAN, None)], ids=["two", "second", "first"])
    def test_a_graph_of_one_folder_is_not_taken_for_another(
        self, plans: tuple[PrunePlan | None, PrunePlan | None], tmp_path: Path
    ) -> None:
        """Dynamo has one graph for all models of a class and its shapes."""
        first, second = (saved(tmp_path / str(i), plan, seed=i) for i, plan in enumerate(plans))
        x = text(2, 30)
        hidden(self.fast(first), x)
        with pytest.raises(OptionError, match="Say which plan each model gets"):
            hidden(self.fast(second), x)
        hidden(self.fast(first), x)  # its own goes on
        given = self.fast(second, plan="default" if plans[1] is None else str(tmp_path / "1"))
        expected = prunepass.prune(second, plans[1], x)
        torch.testing.assert_close(hidden(given, x), hidden(expected, x), atol=1e-5, rtol=0)

    def test_models_of_one_folder_share_a_graph(self, tmp_path: Path) -> None:
        first, x = saved(tmp_path / "pruned", PLAN), text(2, 30)
        second = BertModel.from_pretrained(tmp_path / "pruned").eval()
        torch.testing.assert_close(hidden(self.fast(first), x), hidden(self.fast(second), x))
        assert len(compilations()) == 1

    def test_stale_states_are_told_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="prunepass"):
            for length in (9, 12, 14):
                hidden(self.fast(bert(), keep=0.5, layers=[1], restore="last"), text(2, length))
        said = [r.getMessage() for r in caplog.records if r.name.startswith("prunepass")]
        assert len(said) == 1
        assert "spoils a mean" in said[0]
        assert "restore='mean'" in said[0]


class TestShortForm:
    """Stages without a word on how outputs restore: what the default plan does for the same head."""

    SHORT: ClassVar[dict[str, Any]] = {"keep": 0.5, "layers": [1]}

    def test_a_mean_for_states(self) -> None:
        model, x = bert(), text(2, 40)
        expected = replace(PrunePlan.short(0.5, [1]), restore="mean")
        pruned = prunepass.prune(model, self.SHORT, x)
        assert pruned.plan == expected
        assert prunepass.explain(model, self.SHORT, x).plan == expected
        fast = torch.compile(model, backend="tokprune", options={"target": "eager", **self.SHORT})
        torch.testing.assert_close(hidden(fast, x), hidden(pruned, x), atol=1e-5, rtol=0)
        assert compilations()[0].plan == expected

    def test_what_was_left_with_for_predictions(self) -> None:
        model = BertForMaskedLM(bert().config).eval()
        assert prunepass.prune(model, self.SHORT, text(2, 9)).plan == PrunePlan.short(0.5, [1])

    def test_restore_that_is_given_and_protection_that_is_not(self) -> None:
        given = {**self.SHORT, "restore": "last"}
        assert prunepass.prune(bert(), given, text(2, 40)).plan == PrunePlan.short(0.5, [1])
        assert prunepass.prune(bert(), self.SHORT, text(2, 40)).plan.protect == Protect()

    def test_how_tokens_leave(self) -> None:
        merging = PrunePlan([Stage(1, 0.5, leave="merge")])
        assert PrunePlan.short(0.5, [1], leave="merge") == merging
        model, x = bert(), text(2, 40)
        given = {**self.SHORT, "leave": "merge"}
        pruned = prunepass.prune(model, given, x)
        assert pruned.plan == merging, "the mean weighs a host by what it stands for"
        fast = torch.compile(model, backend="tokprune", options={"target": "eager", **given})
        torch.testing.assert_close(hidden(fast, x), hidden(pruned, x), atol=1e-5, rtol=0)
        assert compilations()[0].plan == pruned.plan
        with pytest.raises(PlanError, match=r"Stage\.leave must be one of drop, merge"):
            prunepass.prune(model, {**self.SHORT, "leave": "melt"}, x)

    def test_how_tokens_leave_the_default_plan(self) -> None:
        fast = torch.compile(bert(), backend="tokprune", options={"target": "eager", "leave": "merge"})
        hidden(fast, text(2, 40))
        plan = compilations()[0].plan
        assert plan is not None
        assert [stage.leave for stage in plan.stages] == ["merge"] * len(PrunePlan.default(4).stages)

    def test_all_kept_is_the_model_itself(self) -> None:
        model = bert()
        assert prunepass.prune(model, {"keep": 1, "layers": [1]}, text(2, 9)) is model

    def test_a_model_of_one_block(self) -> None:
        """Which has no default plan, and needs none."""
        with pytest.raises(PlanError, match="1 block"):
            prunepass.prune(bert(num_layers=1), self.SHORT, text(2, 9))


class TestExport:
    """Each way to export writes the plan that is in the program."""

    def test_the_default_plan_of_a_program(self, tmp_path: Path) -> None:
        traced = capture_module(bert(), text(2, 40))
        folder = prunepass.export(traced.exported, "default", tmp_path / "out", to="pt2")
        assert PrunePlan.from_pretrained(folder) == default_for(Analysis.of(traced.graph_module))

    def test_a_plan_without_stages_is_written_beside_the_model_as_it_is(self, tmp_path: Path) -> None:
        folder = prunepass.export(bert(), PrunePlan([], "norm"), tmp_path / "out", to="pt2")
        assert PrunePlan.from_pretrained(folder) == PrunePlan([], "norm")

    def test_a_pruned_module_brings_its_own(self, tmp_path: Path) -> None:
        pruned = prunepass.prune(bert(), PLAN, text(2, 9))
        assert PrunePlan.from_pretrained(prunepass.export(pruned, None, tmp_path / "out", to="pt2")) == PLAN
        for other in (OTHER, "default"):
            with pytest.raises(ExportError, match="pruned already"):
                prunepass.export(pruned, other, tmp_path / "other", to="pt2")


class TestDefault:
    def plan(self, model: nn.Module, **more: Any) -> PrunePlan:
        return default_for(Analysis.of(capture_module(model, {**text(2, 9), **more}).graph_module))

    def test_states_are_pooled_by_whoever_reads_them(self) -> None:
        plan = self.plan(bert())
        assert (plan.restore, plan.protect) == ("mean", POOLED)
        assert plan.stages == PrunePlan.default(3).stages

    def test_decoders_states_too(self) -> None:
        assert self.plan(zoo.tiny("llama"), use_cache=False).protect == POOLED

    def test_a_pool_inside_the_model(self) -> None:
        class Pooled(Wrapped):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                mask = attention_mask[..., None]
                return (super().forward(input_ids, attention_mask) * mask).sum(1) / mask.sum(1)

        assert self.plan(Pooled(bert())).restore == "mean"

    def test_a_class_read_off_the_first_token(self) -> None:
        model = BertForSequenceClassification(bert().config).eval()
        assert self.plan(model) == PrunePlan.default(3)

    def test_predictions_for_each_token(self) -> None:
        plan = self.plan(BertForMaskedLM(bert().config).eval())
        assert (plan.restore, plan.protect) == ("last", Protect(first=1, last=1))

    def test_the_next_token_is_predicted_from_the_last_one(self) -> None:
        """Of which nothing may be left out: the state it would carry is one of another depth."""
        model = zoo.tiny("llama", "causal", num_hidden_layers=3)
        assert self.plan(model, use_cache=False).protect.last == 1

    def test_short_rows_stay_whole_and_means_are_those_of_the_kept(self) -> None:
        model = bert()
        pruned = prunepass.prune(model, None, text(2, 40))
        short, long = text(3, SHORT_ROW), text(3, POSITIONS)
        torch.testing.assert_close(hidden(pruned, short)[1:], hidden(model, short)[1:], atol=1e-5, rtol=0)
        assert (hidden(pruned, long) - hidden(model, long)).abs().max() > 1e-3


class TestWarnings:
    def traced(self, model: nn.Module) -> GraphModule:
        return capture_module(model, text(2, 9)).graph_module

    def warned(self, graph: GraphModule, plan: PrunePlan) -> str:
        """What a report of the plan on the traced model says of its head."""
        return " ".join(head_warnings(prune_graph(graph, plan, metadata=False)))

    def test_stale_states(self) -> None:
        plan = PrunePlan([Stage(1, 0.5)])
        said = " ".join(prunepass.explain(bert(), plan, text(2, 9)).warnings)
        assert "An output holds a state for each token" in said
        graph = self.traced(bert())
        assert self.warned(graph, plan) == said
        assert not self.warned(graph, PrunePlan([Stage(1, 0.5)], restore="mean"))
        assert not self.warned(graph, PrunePlan([Stage(1, 1)]))
        assert not self.warned(self.traced(BertForSequenceClassification(bert().config).eval()), plan)

    def test_predictions_for_each_token(self) -> None:
        graph = self.traced(BertForMaskedLM(bert().config).eval())
        assert "prediction for each token" in self.warned(graph, PrunePlan([Stage(1, 0.5)]))
        assert "restore='zeros'" in self.warned(graph, PrunePlan([Stage(1, 0.5)], restore="zeros"))
