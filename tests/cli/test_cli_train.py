"""``prunepass train`` and ``search``: wrong input ends with exit code 2 and one line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

from typer.testing import CliRunner, Result

from prunepass.cli.app import app
from prunepass.cli.train import _nextagain
from prunepass.errors import OptionError
from prunepass.plan import PrunePlan, Stage
from prunepass.training.data.options import Goal, SearchOptions, Source, TrainOptions
from prunepass.training.loop.outcome import Outcome
from vocabulary import save_model

GOOD = "text,label\n" + "the cat sat,good\nthe mat,bad\n" * 10
PLAN = PrunePlan((Stage(1, 0.5), Stage(2, 0.25)), scorer="norm")  # type: ignore[arg-type]


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "classifier"))


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> str:
    return write(tmp_path / "data.csv", GOOD)


@pytest.fixture(name="recipe")
def _recipe(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A recipe that trains nothing: what it was called with, and the outcome it hands back or error it raises."""
    calls = SimpleNamespace(options=None, ready=None, fails=None, checkpoint=None)

    def run(options: Any, ready: Any, progress: Any, stop: Any = None) -> Outcome:
        calls.options, calls.ready = options, ready
        progress.begin("training", 2)
        progress.step("a step")
        progress.end()
        if calls.checkpoint is not None:
            checkpoint(calls.checkpoint)
        if calls.fails is not None:
            raise calls.fails
        return Outcome(PLAN, 0.39, {"accuracy": 0.9}, {"accuracy": 0.875}, 1.0, {"seed": options.seed})

    monkeypatch.setattr("prunepass.training.loop.recipe.train", run)
    monkeypatch.setattr("prunepass.training.loop.recipe.search", run)
    return calls


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def checkpoint(folder: Path) -> None:
    """One as the Trainer leaves it, as far as it is looked at before training."""
    folder.mkdir(parents=True)
    step = int(folder.name.removeprefix("checkpoint-"))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args: object) -> str:
    """The error text of a call that must end with exit code 2, on one line, without a traceback."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception)
    return " ".join(result.stderr.split())


def untouched(folder: Path) -> None:
    """Nothing of an output called ``out`` lies in ``folder``, not even in part."""
    assert not [p.name for p in folder.iterdir() if "out" in p.name]


# -- what goes right -------------------------------------------------------------------------------------------------


def test_train_hands_everything_to_the_recipe_and_writes_the_folder(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace
) -> None:
    folder = tmp_path / "deep" / "out"
    options = [
        "--epochs",
        "1.5",
        "--lr",
        "1e-4",
        "--seed",
        "3",
        "--bf16",
        "--freeze-model",
        "--predictor-positions",
        "--protect-token-ids",
        "3,4",
        "--protect-segment",
        "first",
    ]
    result = run("train", model, data, "-o", folder, "--budget", "0.4", *options)
    assert result.exit_code == 0, result.output
    assert recipe.options == TrainOptions(
        model, Source(data), folder, Goal(0.4), epochs=1.5, learning_rate=1e-4, seed=3, bf16=True, freeze_model=True,
        predictor_positions=True, protect_token_ids=(3, 4), protect_segment="first",
    )  # fmt: skip
    assert len(recipe.ready.train) == 18
    assert len(recipe.ready.evaluation) == 2
    assert recipe.ready.teacher is None
    assert PrunePlan.from_pretrained(folder) == PLAN
    assert json.loads((folder / "prunepass_run.json").read_text())["pruned"] == {"accuracy": 0.875}
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert "0.8750" in result.stdout
    assert "39.0%" in result.stdout


def test_search_prints_json_and_nothing_else(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    result = run("search", model, data, "-o", folder, "--budget", "0.4", "--scorer", "norm", "--rows", "5", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cost_share"] == 0.39
    assert len(recipe.ready.calibration) == 5
    assert "5 examples to try plans on are few" in caplog.text
    assert isinstance(recipe.options, SearchOptions)
    assert PrunePlan.from_pretrained(folder) == PLAN


def test_held_out_data_of_its_own(model: str, data: str, tmp_path: Path, recipe: SimpleNamespace) -> None:
    other = write(tmp_path / "eval.csv", "text,label\nthe cat,good\n")
    assert run("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--eval", other).exit_code == 0
    assert (len(recipe.ready.train), len(recipe.ready.evaluation)) == (20, 1)


def test_an_existing_folder_is_replaced_when_asked_for(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    args = ("train", model, data, "-o", folder, "--budget", "0.4")
    assert "not empty" in refused(*args)
    assert recipe.options is None
    assert (folder / "old.txt").exists()
    assert run(*args, "--overwrite").exit_code == 0
    assert not (folder / "old.txt").exists()
    assert (folder / "prunepass.json").exists()


def test_a_run_that_fails_leaves_what_was_there(model: str, data: str, tmp_path: Path, recipe: SimpleNamespace) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    recipe.fails = OptionError("The budget cannot be met; the lowest that can is 0.5.")
    message = refused("train", model, data, "-o", folder, "--budget", "0.4", "--overwrite")
    assert "lowest that can is 0.5" in message
    assert [p.name for p in folder.iterdir()] == ["old.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "out"]


def test_a_folder_that_cannot_be_filled_is_not_half_written(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Outcome, folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OptionError("The disk is full.")

    monkeypatch.setattr(Outcome, "save_pretrained", breaks)
    assert "disk is full" in refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4")
    untouched(tmp_path)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_resume_takes_the_last_checkpoint(model: str, data: str, tmp_path: Path, recipe: SimpleNamespace) -> None:
    args = ("train", model, data, "-o", tmp_path / "out", "--budget", "0.4")
    assert "no checkpoint in" in refused(*args, "--resume")
    home = tmp_path / "out.checkpoints"
    for step in (5, 10, 9):
        checkpoint(home / f"checkpoint-{step}")
    (home / "checkpoint-20").mkdir()  # was being written when the run was stopped
    assert "earlier run" in refused(*args)
    assert run(*args, "--resume").exit_code == 0
    assert recipe.ready.checkpoint == home / "checkpoint-10"


def test_starting_anew_removes_old_checkpoints_and_nothing_else(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace
) -> None:
    home = tmp_path / "out.checkpoints"
    for name in ("checkpoint-5", "runs"):
        (home / name).mkdir(parents=True)
    assert run("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--overwrite").exit_code == 0
    assert [p.name for p in home.iterdir()] == ["runs"]


def test_a_run_that_has_finished_leaves_no_checkpoints_and_says_what_is_next(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace
) -> None:
    recipe.checkpoint = tmp_path / "out.checkpoints" / "checkpoint-7"
    result = run("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--save-steps", "7")
    assert result.exit_code == 0, result.output
    assert recipe.options.save_steps == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "out"]
    export = f"prunepass export {model} {tmp_path}/out-openvino --plan {tmp_path}/out --to openvino"
    assert result.stderr.splitlines()[-1] == f"Next: {export}"
    for more in ([], ["--resume"]):
        message = refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", *more)
        assert "holds a run that has finished" in message


@pytest.mark.parametrize("command", ["train", "search"])
def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(
    command: str, model: str, data: str, tmp_path: Path, recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [command, model, data, "-o", str(tmp_path / "out"), "--budget", "0.4"]
    monkeypatch.setattr("sys.argv", ["/somewhere/prunepass", *args])
    recipe.fails = KeyboardInterrupt()
    result = run(*args)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].endswith(f"Start anew with prunepass {' '.join(args)}")
    if command == "search":
        return
    recipe.checkpoint = tmp_path / "out.checkpoints" / "checkpoint-7"
    result = run(*args)
    assert result.exit_code == 130
    wanted = f"Stopped. Step 7 was saved. Go on with prunepass {' '.join(args)} --resume"
    assert result.stderr.splitlines()[-1] == wanted
    assert not (tmp_path / "out").exists()


def test_a_folder_that_fails_to_be_written_in_the_end_loses_nothing(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Outcome, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outcome, "save_pretrained", full)
    recipe.checkpoint = tmp_path / "out.checkpoints" / "checkpoint-7"
    message = refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4")
    assert "No space left on device" in message
    assert "--resume" in message
    assert (recipe.checkpoint / "trainer_state.json").is_file()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_read(
    command: str, model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("prunepass.plan.folders._try_to_write", full)
    monkeypatch.setattr("prunepass.training.loop.prepare.load", None)
    message = refused(command, model, data, "-o", tmp_path / "deep" / "out", "--budget", "0.4")
    assert "Read-only file system" in message


def test_a_disk_without_room_for_checkpoints_is_found_before_training(
    model: str, data: str, tmp_path: Path, recipe: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunepass.plan.folders._space_left", lambda place: 1000)
    assert "1.0 kB left" in refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4")
    assert recipe.options is None


# -- wrong options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Give either a budget"),
        (["--budget", "0.4", "--latency-ms", "3"], "Give either a budget"),
        (["--budget", "1.5"], "between 0 and 1; 1.5 is not"),
        (["--budget", "nan"], "between 0 and 1"),
        (["--latency-ms", "3"], "needs a runtime"),
        (["--latency-ms", "-3", "--target", "eager"], "above 0, not -3"),
        (["--budget", "0.4", "--target", "openvin"], "Did you mean 'openvino'"),
        (["--budget", "0.4", "--max-length", "65"], "at most 64 tokens"),
        (["--budget", "0.4", "--batch-size", "0"], "--batch-size must be"),
        (["--budget", "0.4", "--protect-token-ids", "3,x"], "whole numbers"),
        (["--budget", "0.4", "--protect-token-ids", "500"], "Token 500"),
    ],
)
@pytest.mark.parametrize("command", ["train", "search"])
def test_wrong_options(command: str, model: str, data: str, tmp_path: Path, args: list[str], said: str) -> None:
    assert said in refused(command, model, data, "-o", tmp_path / "out", *args)
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--logging", "nowhere"], "--logging nowhere: nowhere is not supported"),
        (["--calibration-rows", "0"], "--calibration-rows must be"),
        (["--save-steps", "0"], "--save-steps must be"),
        (["--method", "bot"], "no method 'bot'; choose one of both, top, sdtp"),
        (["--method", "top", "--scorer", "mlp"], "--method both"),
        (["--method", "top", "--freeze-model"], "nothing could be learned"),
        (["--scorer", "norm"], "leave --scorer out"),
        (["--epochs", "0"], "--epochs must be a number above 0"),
        (["--lr", "-1"], "--lr must be a number above 0"),
        (["--eval", "/no/such.csv"], "There is no file /no/such.csv"),
        (["--teacher", "/no/such/model"], "There is no folder /no/such/model"),
    ],
)
def test_wrong_options_of_train(model: str, data: str, tmp_path: Path, args: list[str], said: str) -> None:
    assert said in refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", *args)
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--scorer", "mlp"], "needs trained predictors"),
        (["--scorer", "nrm"], "no scorer 'nrm'"),
        (["--plan", "/no/such/plan"], "no plan at"),
        (["--plan", "x", "--scorer", "norm"], "leave out one"),
        (["--rows", "0"], "--rows must be"),
    ],
)
def test_wrong_options_of_search(model: str, data: str, tmp_path: Path, args: list[str], said: str) -> None:
    assert said in refused("search", model, data, "-o", tmp_path / "out", "--budget", "0.4", *args)
    untouched(tmp_path)


def test_a_plan_without_predictors_is_of_no_use_to_the_mlp_scorer(model: str, data: str, tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path / "plan")
    message = refused("search", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--plan", tmp_path / "plan")
    assert "no trained predictors" in message


# -- wrong data, models and folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "args", "said"),
    [
        ("", [], "is empty"),
        ("text,label\n", [], "has no rows"),
        (GOOD, ["--text", "body"], "no column 'body' for the text; it has 'text', 'label'"),
        ("a,b\nc,d\n", [], "no column with a usual name"),
        (GOOD + "the end,2\n", [], "The label 2 in line 22"),
        (GOOD + "the end,great\n", [], "none of the model's: bad, good"),
        ("text,label\na,1\n", [], "to hold some out takes at least 2"),
    ],
)
def test_wrong_data(model: str, tmp_path: Path, content: str, args: list[str], said: str) -> None:
    data = write(tmp_path / "data.csv", content)
    assert said in refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", *args)
    untouched(tmp_path)


def test_texts_that_are_cut_are_counted(model: str, tmp_path: Path, recipe: SimpleNamespace) -> None:
    data = write(tmp_path / "data.csv", "text,label\n" + "the cat sat on the mat,1\nthe,0\n" * 5)
    result = run("search", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--max-length", "4")
    assert result.exit_code == 0, result.output
    assert recipe.ready.calibration.cut == 5


def test_a_teacher_of_other_classes(model: str, data: str, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", labels=("no", "yes"))
    message = refused("train", model, data, "-o", tmp_path / "out", "--budget", "0.4", "--teacher", teacher)
    assert "predicts something else: classification of no, yes" in message


def test_a_model_whose_head_cannot_be_trained(data: str, tmp_path: Path) -> None:
    import transformers

    from zoo import tiny

    folder = save_model(tmp_path / "model")
    transformers.BertForMultipleChoice(tiny("bert").config).save_pretrained(folder)
    assert "BertForMultipleChoice has a head" in refused(
        "train", folder, data, "-o", tmp_path / "out", "--budget", "0.4"
    )


def test_what_is_read_is_never_replaced(data: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    before = sorted(p.name for p in folder.iterdir())
    assert "which is read" in refused("train", folder, data, "-o", folder, "--budget", "0.4", "--overwrite")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_file_in_the_place_of_the_folder(model: str, data: str) -> None:
    assert "is a file" in refused("search", model, data, "-o", data, "--budget", "0.4", "--overwrite")


def test_both_commands_have_help() -> None:
    for command in ("train", "search"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--budget" in result.stdout


@pytest.mark.slow
def test_two_processes_write_one_folder(model: str, data: str, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "prunepass", "train", model, data, "-o", str(tmp_path / "out"), "--budget", "0.5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *command], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Written to") == 1
    assert PrunePlan.from_pretrained(tmp_path / "out").weights


def test_after_training_on_images_or_sound_python_is_named() -> None:
    """The command makes inputs of texts, so it does not export what reads images."""
    outcome = SimpleNamespace(model=SimpleNamespace(main_input_name="pixel_values"))
    options = SimpleNamespace(out=Path("pruned"))
    said = _nextagain(outcome, options)  # type: ignore[arg-type]  # what is read of them
    assert "prunepass.export(model, None, 'pruned-openvino', example_inputs={'pixel_values': images})" in said
    outcome.model.main_input_name = "input_features"
    said = _nextagain(outcome, options)  # type: ignore[arg-type]  # what is read of them
    assert "example_inputs=dict(feature_extractor([sound, sound], ...))" in said
