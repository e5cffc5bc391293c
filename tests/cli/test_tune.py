"""``prunepass tune``: a tiny classifier for real, what is kept of a run that was stopped, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
from typer.testing import CliRunner, Result

from prunepass.cli.app import app
from prunepass.plan import PrunePlan, Stage
from prunepass.training.loop.settings import Setting, settings_of
from prunepass.training.loop.tune import work_of
from vocabulary import save_model

ROWS = [
    f"{' '.join((['the cat sat on the mat', 'a good film'][i % 2].split() * 3)[: 6 + i % 7])},{['good', 'bad'][i % 2]}"
    for i in range(24)
]
QUICK = ("--scorers", "norm", "--budgets", "0.9", "--max-evaluations", "12", "--timed", "2", "--repeats", "1")


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "classifier", num_hidden_layers=2)


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "\n".join(ROWS), encoding="utf-8")
    return file


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, args)])


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_the_fastest_that_loses_little_is_written(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(model, data, "-o", out, *QUICK, "--loss", "100", "--target", "eager", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = [(one["target"], one["name"]) for one in found["tried"]]
    assert names == [("eager", "dense"), ("eager", "norm 0.9")]
    allowed = [one for one in found["tried"] if one["lost"] <= 100]
    assert found["best"]["milliseconds"] == min(one["milliseconds"] for one in allowed)
    assert found["tried"][1]["flops"] <= 0.9 + 1e-6
    plan = PrunePlan.from_pretrained(out)
    assert bool(plan.stages) == (found["best"]["kind"] == "plan")
    assert {"config.json", "model.safetensors", "tokenizer.json", "prunepass_run.json"} <= {
        p.name for p in out.iterdir()
    }
    if found["best"]["kind"] == "plan":  # on rows that nothing was chosen by
        assert found["report"]["rows"] == len(ROWS) // 2
    assert not work_of(out).exists()


def test_a_budget_that_cannot_be_met_is_told_of(model: Path, data: Path, tmp_path: Path) -> None:
    few = ("--scorers", "norm", "--budgets", "0.01", "--timed", "1", "--repeats", "1", "--target", "eager")
    result = run(model, data, "-o", tmp_path / "out", *few)
    assert result.exit_code == 0, result.output
    assert "Not tried: norm 0.01" in result.stdout
    assert "no plan is worth it" in " ".join(result.stdout.split())


def test_plans_of_a_run_that_was_stopped_are_taken_up(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = (model, data, "-o", out, *QUICK, "--loss", "100", "--target", "eager")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prunepass.training.loop.tune._timed", stopped)
        result = run(*given)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    found = work_of(out) / "norm-0.9"
    assert PrunePlan.from_pretrained(found).stages
    kept = PrunePlan([Stage(1, 0.5)], scorer="norm")
    kept.save_pretrained(found)
    (work_of(out) / "mine.txt").write_text("mine", encoding="utf-8")
    assert "--resume" in refused(*given)
    assert "another --seed" in refused(*given, "--resume", "--seed", "1")
    assert PrunePlan.from_pretrained(found) == kept
    result = run(*given, "--resume", "--json")
    assert result.exit_code == 0, result.output
    (plan,) = (one["plan"] for one in json.loads(result.stdout)["tried"] if one["name"] == "norm 0.9")
    assert PrunePlan.from_dict(plan) == kept
    assert [p.name for p in work_of(out).iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_openvino_folders_are_written_with_the_precision_to_run_them_in(
    model: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    result = run(model, data, "-o", tmp_path / "out", *QUICK, "--loss", "0", "--target", "openvino")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "openvino_model.xml").is_file()
    assert "openvino f32" in result.stdout
    best = json.loads((tmp_path / "out" / "prunepass_run.json").read_text())["best"]
    assert ("INFERENCE_PRECISION_HINT=" in result.stdout) == bool(best["config"])


@pytest.mark.slow
def test_int8_is_scored_timed_and_written(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    module = "prunepass.training.loop.tune.settings_of"
    monkeypatch.setattr(module, lambda target, _: iter([Setting(target, int8=True)]))
    out = tmp_path / "out"
    result = run(model, data, "-o", out, *QUICK, "--loss", "100", "--target", "openvino")
    assert result.exit_code == 0, result.output
    assert "openvino int8" in result.stdout
    run_file = json.loads((out / "prunepass_run.json").read_text())
    assert run_file["best"]["int8"]
    assert all(one["milliseconds"] > 0 for one in run_file["tried"])
    kinds = {op.get_type_name() for op in openvino.Core().read_model(out / "openvino_model.xml").get_ordered_ops()}
    assert "FakeQuantize" in kinds


def test_settings_are_what_can_run_here() -> None:
    tried = [str(setting) for setting in settings_of("openvino", torch.nn.Linear(2, 2))]
    assert tried[0] == "openvino f32"
    assert set(tried[1:]) <= {"openvino bf16", "openvino int8"}
    assert [str(setting) for setting in settings_of("eager", torch.nn.Linear(2, 2))] == ["eager"]


def test_bad_input_is_refused_and_nothing_written(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "Unknown target 'openvimo'" in refused(model, data, "-o", out, "--target", "openvimo")
    assert "--budgets" in refused(model, data, "-o", out, "--budgets", "1.5")
    assert "'mlp'" in refused(model, data, "-o", out, "--scorers", "mlp")
    assert "--loss" in refused(model, data, "-o", out, "--loss", "-1")
    assert "nothing" in refused(model, data, "-o", out, "--resume")
    assert "--train" in refused(model, data, "-o", out, "--epochs", "3")
    work_of(out).mkdir()
    (work_of(out) / "mine.txt").write_text("mine", encoding="utf-8")
    assert "was not written by prunepass tune" in refused(model, data, "-o", out, "--resume")
    (work_of(out) / "mine.txt").unlink()
    work_of(out).rmdir()
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    assert "not empty" in refused(model, data, "-o", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert not work_of(out).exists()


@pytest.mark.slow
def test_training_goes_along(model: Path, data: Path, tmp_path: Path) -> None:
    given = ("--scorers", "norm", "--budgets", "0.9", "--max-evaluations", "12", "--timed", "2", "--repeats", "1")
    out = tmp_path / "out"
    result = run(
        model, data, "-o", out, *given, "--loss", "100", "--target", "eager", "--train", "--epochs", "1", "--json"
    )
    assert result.exit_code == 0, result.output
    assert "trained 0.9" in [one["name"] for one in json.loads(result.stdout)["tried"]]
