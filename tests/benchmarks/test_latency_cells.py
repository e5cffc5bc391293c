"""The latency benchmark on a tiny BERT: records with made-up times, what is skipped, and real calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import torch
from latency_records import record
from typer.testing import CliRunner

from benchmarks.latency import __main__ as command
from benchmarks.latency import models, results, sweep, targets
from benchmarks.latency.cells import Group, Setup, measure
from benchmarks.latency.compiling import Compiling, first_call, measure_compiling
from benchmarks.latency.corpus import DENSE, Texts, measure_corpus, padded
from benchmarks.latency.models import MODELS, Shape
from benchmarks.latency.sweep import Outcome, Sweep, run_groups
from benchmarks.latency.tables import markdown
from benchmarks.latency.targets import TARGETS
from prunepass.errors import OptionError

BLOCKS, POSITIONS, VOCABULARY = 4, 64, 97
BUDGETS = (Fraction(1, 2), Fraction(1, 4))
SETUP = Setup(repeats=3)
Ways = Mapping[Any, Callable[[], object]]


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    config = partial(
        transformers.BertConfig,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Shape("tiny", config, BLOCKS, POSITIONS))
        yield


def group(**changes: Any) -> Group:
    return replace(Group("tiny", "eager-f32", 48, 2), **changes)


def no_calls(ways: Ways, repeats: int, *, seconds: float | None = None) -> dict[Any, list[float]]:
    """Times of a runtime whose blocks take 1 ms a token; pruning costs it a quarter more than the ideal."""

    def taken(kind: str, size: Any) -> float:
        if kind == "pruned":
            return 100.0
        return 5.0 + (BLOCKS if kind == "whole" else 1) * float(size)

    return {key: [taken(*key)] * repeats for key in ways}


@pytest.fixture(scope="module")
def made(_tiny: None) -> dict[str, Any]:
    """A record that no model ran for."""
    return measure(group(), BUDGETS, SETUP, turns=no_calls)


# -- a group of cells ------------------------------------------------------------------------------------------------


def test_a_record_holds_what_the_table_reads(made: dict[str, Any]) -> None:
    assert json.loads(json.dumps(made)) == made
    assert set(record()) <= set(made)
    assert all(set(record()["cells"][0]) <= set(cell) for cell in made["cells"])
    assert {"torch", "transformers", "python"} <= set(made["versions"])
    assert [cell["budget"] for cell in made["cells"]] == ["1/2", "1/4"]
    assert "tiny, eager-f32" in markdown([made])


def test_plans_meet_their_budgets_in_flops(made: dict[str, Any]) -> None:
    for cell, budget in zip(made["cells"], BUDGETS, strict=True):
        assert cell["flops"]["pruned"] / cell["flops"]["dense"] == pytest.approx(float(budget), rel=0.1)
        assert cell["flops_ratio"] == pytest.approx(cell["flops"]["dense"] / cell["flops"]["pruned"], abs=1e-3)


def test_ratios_follow_from_the_times(made: dict[str, Any]) -> None:
    assert made["dense"]["p50"] == 5 + BLOCKS * 48
    assert made["outside_blocks"] == 5
    for cell in made["cells"]:
        ideal = 5 + sum(cell["block_lengths"])
        assert cell["ideal"]["p50"] == pytest.approx(ideal)
        assert cell["overhead"] == pytest.approx(100 / ideal, abs=1e-3)
        assert cell["speedup"] == pytest.approx(197 / 100, abs=1e-3)
        assert cell["ideal_speedup"] == pytest.approx(197 / ideal, abs=1e-3)
        assert cell["share_of_flops_ratio"] == pytest.approx(cell["speedup"] / cell["flops_ratio"], abs=1e-3)


@pytest.mark.slow
def test_an_mlp_scorer_gets_weights() -> None:
    made = measure(group(), BUDGETS[:1], replace(SETUP, scorer="mlp"), turns=no_calls)
    assert made["scorer"] == "mlp"
    assert made["cells"][0]["flops_ratio"] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": POSITIONS + 1}, "takes 2 to 64 tokens"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"shapes": "fixed"}, "dynamic or static"),
        ({"model": "other"}, "no model 'other'; there are"),
        ({"target": "other"}, "no target 'other'; there are"),
    ],
)
def test_what_cannot_be_measured_says_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        measure(group(**changes), BUDGETS, SETUP, turns=no_calls)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["dynamic", "static"])
@pytest.mark.parametrize("target", ["eager-f32", "openvino-f32", "openvino-int8", "onnxruntime-int8"])
def test_a_real_run(target: str, shapes: str) -> None:
    if reason := TARGETS[target].why_not():
        pytest.skip(reason)  # its package is an extra
    made = measure(group(target=target, shapes=shapes), BUDGETS[1:], Setup(repeats=2))
    assert made["repeats"] == 2
    assert made["cells"][0]["pruned"]["p50"] > 0


# -- the building blocks ---------------------------------------------------------------------------------------------


def test_the_shallow_model_differs_in_its_blocks_alone() -> None:
    whole, one = MODELS["tiny"].build(), MODELS["tiny"].build(blocks=1)
    names = {name for name, _ in one.named_parameters()}
    assert names < {name for name, _ in whole.named_parameters()}
    block = {name for name, _ in whole.named_parameters() if ".layer.0." in name}
    assert {name for name in names if ".layer." in name} == block


def test_inputs_are_live_tokens_of_the_vocabulary() -> None:
    made = models.inputs(MODELS["tiny"].build(1), 3, 7)
    assert made["input_ids"].shape == made["attention_mask"].shape == (3, 7)
    assert bool(made["attention_mask"].all())
    assert int(made["input_ids"].max()) < VOCABULARY


def test_targets_of_missing_packages_say_so() -> None:
    there = targets.Target("some", "f32", TARGETS["eager-f32"].make, packages=("no_such_package",))
    assert there.why_not() == "it needs the package no_such_package"
    assert TARGETS["eager-f32"].why_not() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_targets_of_a_missing_device_say_so() -> None:
    assert "CUDA" in str(TARGETS["inductor-cuda-bf16"].why_not())


# -- many groups -----------------------------------------------------------------------------------------------------


def wanted(**changes: Any) -> Sweep:
    return replace(Sweep(("tiny",), ("eager-f32",), (48,), (2,), BUDGETS), **changes)


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Outcome]:
    """Outcomes, where measuring gives a made-up record and fails for batches of 13."""

    def fake(one: Group, budgets: Sequence[Fraction], setup: Setup) -> dict[str, Any]:
        if one.batch == 13:
            raise RuntimeError("the runtime gave up")
        cells = [{"budget": str(budget)} for budget in budgets]
        return record(batch=one.batch, cells=cells)

    monkeypatch.setattr(sweep, "measure", fake)
    return list(run_groups(wanted(**changes), folder))


def test_groups_with_results_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def what(**changes: Any) -> list[str]:
        return [outcome.what for outcome in swept(tmp_path, monkeypatch, **changes)]

    assert what() == ["written"]
    assert what() == ["there already"]
    assert what(batches=(2, 3)) == ["there already", "written"]
    assert what(budgets=(Fraction(1, 3),)) == ["written"]
    assert len(next(results.read(tmp_path))["cells"]) == 3
    assert what(again=True) == ["written"]


def test_groups_that_cannot_be_measured_are_named_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "unmade", replace(TARGETS["eager-f32"], packages=("no_such_package",)))
    found = swept(tmp_path, monkeypatch, targets=("unmade", "eager-f32"), lengths=(48, 512))
    assert [outcome.what for outcome in found] == ["skipped", "skipped", "written", "skipped"]
    assert "it needs the package no_such_package" in str(found[0])
    assert "at most 64 tokens" in str(found[3])


def test_one_failure_does_not_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(tmp_path, monkeypatch, batches=(13, 2))
    assert [outcome.what for outcome in found] == ["failed", "written"]
    assert "RuntimeError: the runtime gave up" in str(found[0])


def test_unknown_names_are_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no target 'onyx'"):
        swept(tmp_path, monkeypatch, targets=("eager-f32", "onyx"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "none"], "no preset 'none'"),
        (["--lengths", "long"], "--lengths takes whole numbers"),
        (["--budgets", "2"], "--budgets takes fractions"),
        (["--budgets", "1/0"], "--budgets takes fractions"),
    ],
)
def test_wrong_options_say_what_to_do(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(command.app, ["run", *arguments])
    assert isinstance(found.exception, OptionError)
    assert message in str(found.exception)


def test_the_command_runs_and_makes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "measure", lambda one, budgets, setup: record(length=one.length))
    options = ["--models", "tiny", "--targets", "eager-f32", "--lengths", "48,32", "--batches", "2"]
    found = CliRunner().invoke(command.app, ["run", *options, "--folder", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert CliRunner().invoke(command.app, ["table", "--folder", str(tmp_path)]).exit_code == 0


# -- a corpus --------------------------------------------------------------------------------------------------------

TEXTS = Texts("sst2", [[2] * n for n in (9, 30, 4, 12, 17)], 32)


def test_texts_are_padded_in_three_ways() -> None:
    shapes = {padding: [tuple(b["input_ids"].shape) for b in padded(TEXTS, 2, padding)] for padding in ("max", "batch")}
    assert shapes == {"max": [(2, 32), (2, 32), (1, 32)], "batch": [(2, 30), (2, 12), (1, 17)]}
    by_length = padded(TEXTS, 2, "sorted")
    assert [b["attention_mask"].sum(1).tolist() for b in by_length] == [[4, 9], [12, 17], [30]]


def test_a_corpus_holds_every_pruned_way_against_every_dense_one() -> None:
    widths = {padding: [b["input_ids"].shape[1] for b in padded(TEXTS, 2, padding)] for padding in ("max", "batch")}

    def turns(ways: Ways, repeats: int, *, seconds: float | None = None) -> dict[Any, list[float]]:
        """Dense takes 10 ms a batch padded to the maximum and 5 else; pruned ways take half."""

        def taken(name: str, padding: str, _: int) -> float:
            return (10.0 if padding == "max" else 5.0) / (1 if name == DENSE else 2)

        return {key: [taken(*key)] * repeats for key in ways}

    made = measure_corpus(group(length=0), TEXTS, BUDGETS[:1], SETUP, turns=turns)
    (cell,) = made["cells"]
    assert cell["speedup"]["batch"] == {"max": 4.0, "batch": 2.0, "sorted": 2.0}
    assert made["dense"]["max"]["texts_per_second"] == pytest.approx(5 / 0.03, abs=0.01)
    assert cell["flops_ratio"]["max"]["max"] == pytest.approx(2, rel=0.15)
    assert sum(widths["batch"]) < sum(widths["max"])
    assert cell["flops_ratio"]["batch"]["max"] > cell["flops_ratio"]["batch"]["batch"] > 1
    assert (made["texts"], made["batches"], made["median_tokens"]) == (5, 3, 12)
    assert "## sst2, tiny, eager-f32, batches of 2" in markdown([], [made])


def test_a_corpus_needs_dynamic_shapes_and_texts_that_fit() -> None:
    with pytest.raises(OptionError, match="dynamic shapes"):
        measure_corpus(group(shapes="static"), TEXTS, BUDGETS, SETUP)
    with pytest.raises(OptionError, match="takes 64 tokens"):
        measure_corpus(group(), replace(TEXTS, max_length=512), BUDGETS, SETUP)


@pytest.mark.parametrize("budget", [None, "1/2"])
def test_a_first_call_costs_more_than_a_second(budget: str | None) -> None:
    found = first_call(Compiling("tiny", "eager-f32", budget, length=32))
    assert found["seconds"] > 0 < found["cpu_seconds"]
    assert found["mebibytes"] >= 0
    calls = dict.fromkeys(("dense", "pruned"), found)
    record = {"model": "tiny", "target": "eager-f32", "length": 32, "budget": "1/2", "first_call": calls}
    assert f"| {found['seconds']:.1f} ({found['cpu_seconds']:.1f}) |  |  |" in markdown([], [], [record])


def test_a_first_call_that_fails_says_why() -> None:
    with pytest.raises(OptionError, match="There is no model 'tiny'"):  # in a process of its own there is none
        measure_compiling(Compiling("tiny", "eager-f32", None))
