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
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import torch
from latency_records import corpus_group
from latency_records import group as recorded

from benchmarks.latency import models, targets
from benchmarks.latency.models import MODELS, Shape
from benchmarks.latency.targets import TARGETS
from benchmarks.runner import Outcome, run
from benchmarks.store import Group, read
from benchmarks.tasks import latency, throughput
from benchmarks.tasks.first_call import Call, first_call
from benchmarks.tasks.first_call import measure as measure_first_call
from benchmarks.tasks.throughput import DENSE, Texts, padded
from prunepass.errors import OptionError

BLOCKS, POSITIONS, VOCABULARY = 4, 64, 97
BUDGETS = ("1/2", "1/4")
OPTIONS = latency.Benchmark(repeats=3, threads=1)
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


def measure(budgets: Sequence[str] = BUDGETS, turns: Any = latency.in_turns, **changes: Any) -> Group:
    """Of the tiny model."""
    where = {"model": "tiny", "target": "eager-f32", "length": 48, "batch": 2}
    chosen = where | {k: changes.pop(k) for k in list(changes) if k in where}
    shared, rows = latency.measure(replace(OPTIONS, **changes), *chosen.values(), budgets, turns)
    return Group({**chosen, "shapes": "dynamic", "scorer": "norm", "stages": 4, **shared}, list(rows))


def no_calls(ways: Ways, repeats: int, *, seconds: float | None = None) -> dict[Any, list[float]]:
    """Times of a runtime whose blocks take 1 ms a token; pruning costs it a quarter more than the ideal."""

    def taken(kind: str, size: Any) -> float:
        if kind == "pruned":
            return 100.0
        return 5.0 + (BLOCKS if kind == "whole" else 1) * float(size)

    return {key: [taken(*key)] * repeats for key in ways}


@pytest.fixture(scope="module")
def made(_tiny: None) -> Group:
    """A group that no model ran for."""
    return measure(turns=no_calls)


# -- a group of cells ------------------------------------------------------------------------------------------------


def test_a_group_holds_what_the_page_reads(made: Group) -> None:
    assert json.loads(json.dumps(made.shared)) == made.shared
    assert set(recorded().shared) <= set(made.shared)
    assert all(set(row) == set(recorded().rows[0]) for row in made.rows)
    assert {"torch", "transformers", "python"} <= set(made.shared["versions"])
    assert [row["budget"] for row in made.rows] == ["1/2", "1/4"]
    assert "tiny, eager-f32" in next(latency.Benchmark.page([made]))


def test_plans_meet_their_budgets_in_flops(made: Group) -> None:
    for row, budget in zip(made.rows, BUDGETS, strict=True):
        assert row["flops"] / made.shared["dense_flops"] == pytest.approx(float(Fraction(budget)), rel=0.1)


def test_figures_follow_from_the_times(made: Group) -> None:
    assert made.shared["dense"][0] == 5 + BLOCKS * 48
    assert made.shared["outside_blocks"] == 5
    for row in made.rows:
        lengths = [int(n) for n in made.shared["block"]]
        assert row["pruned"] == [100.0, 100.0]
        assert 5 + BLOCKS * min(lengths) <= row["ideal"][0] < 5 + BLOCKS * 48
        assert row["overhead_quartiles"] == [pytest.approx(100 / row["ideal"][0], abs=1e-3)] * 2
        assert row["speedup_quartiles"] == [pytest.approx(197 / 100, abs=1e-3)] * 2


@pytest.mark.slow
def test_an_mlp_scorer_gets_weights() -> None:
    made = measure(BUDGETS[:1], no_calls, scorer="mlp")
    assert made.shared["dense_flops"] / made.rows[0]["flops"] == pytest.approx(2, rel=0.1)


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
        measure(turns=no_calls, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["dynamic", "static"])
@pytest.mark.parametrize("target", ["eager-f32", "openvino-f32", "openvino-int8", "onnxruntime-int8"])
def test_a_real_run(target: str, shapes: str) -> None:
    if reason := TARGETS[target].why_not():
        pytest.skip(reason)  # its package is an extra
    made = measure(BUDGETS[1:], target=target, shapes=shapes, repeats=2)
    assert made.shared["repeats"] == 2
    assert made.rows[0]["pruned"][0] > 0


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


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch, again: bool = False, **changes: Any) -> list[Outcome]:
    """Outcomes, where measuring gives a made-up group and fails for batches of 13."""

    def fake(_: Any, model: str, target: str, length: int, batch: int, budgets: Sequence[str]) -> Any:
        if batch == 13:
            raise RuntimeError("the runtime gave up")
        return {}, [{"budget": budget} for budget in budgets]

    monkeypatch.setattr(latency, "measure", fake)
    sizes = {"models": ("tiny",), "targets": ("eager-f32",), "lengths": (48,), "batches": (2,)}
    budgets = {"budgets": tuple(map(Fraction, BUDGETS))}
    return list(run("latency", replace(OPTIONS, **sizes | budgets | changes), folder, again=again))


def test_groups_with_results_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def what(**changes: Any) -> list[str]:
        return [outcome.what for outcome in swept(tmp_path, monkeypatch, **changes)]

    assert what() == ["written"]
    assert what() == ["there already"]
    assert what(batches=(2, 3)) == ["there already", "written"]
    assert what(budgets=(Fraction(1, 3),)) == ["written"]
    assert [row["budget"] for row in read("latency", tmp_path)[0].rows] == ["1/2", "1/3", "1/4"]
    assert what(again=True) == ["written"]
    assert what(threads=2) == what(scorer="mlp") == what(stages=3) == what(shapes="static") == ["written"]


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
    for changes, message in (({"targets": ("eager-f32", "onyx")}, "target 'onyx'"), ({"preset": "no"}, "preset 'no'")):
        with pytest.raises(OptionError, match=message):
            swept(tmp_path, monkeypatch, **changes)
    assert not list(tmp_path.iterdir())


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

    options = throughput.Benchmark(batch=2, repeats=3, threads=1)
    shared, rows = throughput.measure(options, "tiny", "eager-f32", TEXTS, BUDGETS[:1], turns)
    dense, pruned = rows
    assert set(corpus_group().rows[0]) == set(pruned)
    assert dense["rates"]["max"][0] == pytest.approx(5 / 0.03, abs=0.01)
    assert pruned["rates"]["batch"][0] == pytest.approx(5 / 0.0075, abs=0.01)
    assert sum(widths["batch"]) < sum(widths["max"])
    (max_max, *_), (batch_max, batch_batch, _), _ = pruned["flops_ratio"]
    assert max_max == pytest.approx(2, rel=0.15)
    assert batch_max > batch_batch > 1
    assert (shared["texts"], shared["batches"], shared["median_tokens"]) == (5, 3, 12)


def test_a_corpus_needs_texts_that_fit() -> None:
    options = throughput.Benchmark()
    with pytest.raises(OptionError, match="takes 64 tokens"):
        throughput.measure(options, "tiny", "eager-f32", replace(TEXTS, max_length=512), BUDGETS)
    with pytest.raises(OptionError, match="no corpus 'other'"):
        list(throughput.Benchmark(corpora=("other",)).cells())


@pytest.mark.parametrize("budget", [None, pytest.param("1/2", marks=pytest.mark.slow)])
def test_a_first_call_costs_more_than_a_second(budget: str | None) -> None:
    found = first_call(Call("tiny", "eager-f32", budget, length=32))
    assert found["seconds"] > 0 < found["cpu_seconds"]
    assert found["mebibytes"] >= 0


def test_a_first_call_that_fails_says_why() -> None:
    with pytest.raises(OptionError, match="There is no model 'tiny'"):  # in a process of its own there is none
        list(measure_first_call(Call("tiny", "eager-f32", None))[1])
