"""``prunepass eval``: a tiny classifier for real, and what is said of figures that are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from prunepass.cli.app import app
from prunepass.plan import PrunePlan, ScorerSpec, Stage
from prunepass.training.loop.evaluate import longest_of
from prunepass.training.loop.trial import CUT, DENSE, DISTANCE, PLAN, RANDOM, Entry, Trial, by_lot
from vocabulary import save_model

ROWS = [
    f"{' '.join(['the cat sat on the mat', 'a good film'][i % 2].split()[: 2 + i % 4] * 3)},{['good', 'bad'][i % 2]}"
    for i in range(24)
]
HALF = PrunePlan([Stage(1, 0.5)], scorer="norm")
ALL = PrunePlan([Stage(1, 1)], scorer="norm")
F32 = "INFERENCE_PRECISION_HINT=f32"


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "classifier", num_hidden_layers=2)


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.csv"
    file.write_text("text,label\n" + "\n".join(ROWS), encoding="utf-8")
    return file


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


# -- a model for real ------------------------------------------------------------------------------------------------


def test_plans_beside_what_they_must_beat(model: Path, data: Path, tmp_path: Path) -> None:
    for name, plan in (("half", HALF), ("all", ALL)):
        plan.save_pretrained(tmp_path / name)
    plans = ("--plan", tmp_path / "half", "--plan", tmp_path / "all")
    picture = tmp_path / "scores.svg"
    timing = ("--target", "eager", "--timed", "2", "--repeats", "1")
    result = run(model, data, *plans, *timing, "--picture", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["headline"] == "accuracy"
    assert found["rows"] == len(ROWS)
    kinds = [(entry["kind"], Path(entry["of"]).name) for entry in found["entries"]]
    # what keeps every token costs what the dense model does, so no text is cut for it
    assert kinds == [(DENSE, DENSE), (CUT, "half"), (RANDOM, "half"), (PLAN, "half"), (RANDOM, "all"), (PLAN, "all")]
    dense, cut, drawn, half, _, whole = found["entries"]
    assert whole["figures"] == pytest.approx(dense["figures"])
    assert whole["changes"]["accuracy"] == [0, 0]
    assert half["figures"]["loss"] != pytest.approx(dense["figures"]["loss"], abs=1e-6)
    assert half["flops"] < 1 == dense["flops"]
    assert drawn["plan"]["scorer"] == {"name": "random", "seed": 0}
    assert 3 <= cut["tokens"] < 14
    timed = [entry for entry in found["entries"] if entry["kind"] != RANDOM]
    assert all(entry["milliseconds"] > 0 and len(entry["speedup"]) == 3 for entry in timed)
    assert len(found["verdicts"]) == 2
    assert "</svg>" in picture.read_text(encoding="utf-8")


def test_without_labels_answers_are_compared_with_the_dense_models(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text\n" + "\n".join(row.partition(",")[0] for row in ROWS), encoding="utf-8")
    result = run(model, file, "--timed", "0", "--rows", "12", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    dense, *_, plan = found["entries"]
    assert found["headline"] == DISTANCE
    assert found["rows"] == 12
    assert dense["figures"][DISTANCE] == pytest.approx(0, abs=1e-7)
    assert plan["figures"][DISTANCE] > 0
    assert plan["of"] == "default plan"
    assert plan["milliseconds"] is None


def test_a_trained_folder_is_run_with_its_own_model_and_may_be_called_dense(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a picture gets its folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    other = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        other.classifier.bias += torch.tensor([100.0, 0.0])  # all rows in the first class
    for part in (other, AutoTokenizer.from_pretrained(model)):
        part.save_pretrained(tmp_path / "dense")
    ALL.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    picture = Path("new") / "scores.svg"
    result = run(model, data, "--plan", "dense", "--timed", "0", "--picture", picture, "--json")
    assert result.exit_code == 0, result.output
    dense, *_, plan = json.loads(result.stdout)["entries"]
    assert (dense["name"], plan["name"]) == ("dense", "dense (plan)")
    assert plan["figures"]["accuracy"] == pytest.approx(0.5)
    assert plan["figures"]["loss"] > dense["figures"]["loss"] + 10
    assert plan["changes"]
    assert picture.is_file()


@pytest.mark.slow
def test_scores_in_int8(model: Path, data: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    given = (model, data, "--plan", "default", "--target", "openvino", "--timed", "2", "--repeats", "1", "--json")
    given += ("--deployed",)
    floats, ints = (json.loads(run(*given, *more).stdout) for more in (["--config", F32], ["--int8"]))
    assert (floats["int8"], ints["int8"]) == (False, True)
    assert ints["precision"].startswith("int8")
    for one, other in zip(floats["entries"], ints["entries"], strict=True):
        assert one["name"] == other["name"]
        assert one["figures"]["loss"] != other["figures"]["loss"], "it is another arithmetic"
        assert other["figures"]["loss"] == pytest.approx(one["figures"]["loss"], rel=0.1)


def test_int8_needs_what_computes_in_it(model: Path, data: Path) -> None:
    assert "--int8 needs --deployed and --target openvino" in refused(model, data, "--int8")
    assert "--int8 needs" in refused(model, data, "--int8", "--target", "openvino")


def test_scores_of_the_target_itself(model: Path, data: Path, tmp_path: Path) -> None:
    HALF.save_pretrained(tmp_path / "half")
    given = (model, data, "--plan", tmp_path / "half", "--timed", "0", "--target", "eager", "--json")
    here, there = (json.loads(run(*given, *more).stdout) for more in ([], ["--deployed"]))
    assert there["deployed"]
    assert there["target"] == "eager"
    for one, other in zip(here["entries"], there["entries"], strict=True):
        assert one["name"] == other["name"]
        assert one["figures"] == pytest.approx(other["figures"], abs=1e-5)


def test_the_table_says_whether_it_is_worth_it(model: Path, data: Path) -> None:
    result = run(model, data, "--timed", "0")
    assert result.exit_code == 0, result.output
    assert "random tokens" in result.stdout
    assert "default plan: " in result.stdout
    assert "of the FLOPs" in result.stdout


def test_bad_input_is_refused_before_anything_is_loaded(model: Path, data: Path, tmp_path: Path) -> None:
    assert "Unknown target 'openvimo'" in refused("no-model", data, "--target", "openvimo")
    assert ".svg" in refused("no-model", data, "--picture", tmp_path / "scores.gif")
    assert "--rows" in refused(model, data, "--rows", "1")
    assert "--timed" in refused("no-model", data, "--timed", "0", "--config", "NUM_STREAMS=1")
    assert "There is no plan at" in refused("no-model", data, "--plan", tmp_path / "nothing")
    other = save_model(tmp_path / "other", labels=("red", "green"), num_hidden_layers=2)
    ALL.save_pretrained(other)
    assert "predicts something else" in refused(model, data, "--plan", other)


# -- what is said ----------------------------------------------------------------------------------------------------


def entry(kind: str, accuracy: float, speedup: float | None = None, flops: float = 0.4, **more: Any) -> Entry:
    name = more.pop("name", kind)
    times = {} if speedup is None else {"milliseconds": 10 / speedup, "speedup": (speedup, speedup, speedup)}
    changes = more.pop("changes", {})
    return Entry(name, kind, "plan", None, {"accuracy": accuracy}, {}, changes, flops, **times, **more)


def verdict(*entries: Entry, headline: str = "accuracy", details: Mapping[str, Any] | None = None) -> str:
    dense = entry(DENSE, 0.9, 1.0, 1.0)
    (said,) = Trial(headline, (dense, *entries), (), details or {"target": "openvino"}).verdicts
    return said


def test_a_plan_that_keeps_the_score_is_worth_it() -> None:
    said = verdict(entry(CUT, 0.8, 2.0, tokens=60), entry(RANDOM, 0.7), entry(PLAN, 0.895, 1.9))
    assert said == (
        "plan: 1.90 times as fast on openvino, 40% of the FLOPs and 0.5 points of accuracy lost. Worth it. At the same "
        "FLOPs cut texts lose 10.0 points and tokens drawn by lot lose 20.0 points."
    )


def test_a_plan_is_not_worth_it_that_gains_no_time_or_loses_to_cut_texts() -> None:
    assert "hardly faster" in verdict(entry(PLAN, 0.9, 1.05))
    assert "texts cut to 60 tokens" in verdict(entry(CUT, 0.88, 2.0, tokens=60), entry(PLAN, 0.85, 1.9))
    assert "drawn by lot lose 2.0" in verdict(entry(RANDOM, 0.88), entry(PLAN, 0.85, 1.9))
    assert "at a price" in verdict(entry(RANDOM, 0.6), entry(PLAN, 0.85, 1.9))


def test_distances_are_no_points() -> None:
    def away(kind: str, distance: float, **more: Any) -> Entry:
        return Entry(kind, kind, "plan", None, {DISTANCE: distance}, {}, {}, 0.5, **more)

    entries = (away(DENSE, 0.0), away(CUT, 0.02, tokens=60), away(RANDOM, 0.05), away(PLAN, 0.004))
    (said,) = Trial(DISTANCE, entries, (), {"target": None}).verdicts
    assert said == (
        "plan: 50% of the FLOPs and 0.0040 away from the dense model's answers. Worth it. At the same FLOPs cut texts "
        "are 0.0200 away and tokens drawn by lot are 0.0500 away."
    )


def test_few_rows_leave_a_doubt() -> None:
    wide = entry(PLAN, 0.9, 1.9, changes={"accuracy": (-0.035, 0.02)})
    said = verdict(wide, details={"target": "openvino", "rows": 200})
    assert "(difference -3.5 to +2.0)" in said
    assert "200 rows do not rule out a loss of 3.5 points" in said


def test_without_times_flops_decide() -> None:
    assert verdict(entry(PLAN, 0.9, flops=0.4)).startswith(
        "plan: 40% of the FLOPs and no points of accuracy lost. Worth it."
    )
    assert "hardly faster" in verdict(entry(PLAN, 0.9, flops=0.95))


# -- what plans must beat --------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    share=st.floats(0.01, 0.99),
    linear=st.integers(1, 50),
    square=st.integers(0, 3),
)
def test_cut_texts_cost_as_much_as_they_may_and_not_more(
    lengths: list[int], share: float, linear: int, square: int
) -> None:
    def flops(n: int) -> int:
        return linear * n + square * n * n

    def cost(longest: int) -> int:
        return sum(flops(min(n, longest)) for n in lengths)

    found = longest_of(flops, lengths, share)
    assert cost(found) <= share * cost(max(lengths)) < cost(found + 1)


def test_tokens_drawn_by_lot_take_the_same_stages_and_keep_lenses() -> None:
    stages = [Stage(1, 0.5), Stage(2, 0.25, scorer="attention")]
    weights = {"stages.0.lens.down": torch.zeros(2), "stages.0.weight": torch.ones(2)}
    plan = PrunePlan(stages, scorer="norm", restore="lens", weights=weights)
    drawn = by_lot(plan, 3)
    assert [(s.layer, s.keep, s.scorer) for s in drawn.stages] == [
        (1, plan.stages[0].keep, None),
        (2, plan.stages[1].keep, None),
    ]
    assert drawn.scorer == ScorerSpec("random", (("seed", 3),))
    assert list(drawn.weights) == ["stages.0.lens.down"]
    assert drawn.restore == "lens"
