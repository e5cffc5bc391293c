"""Which state of training is taken: the best of those looked at, the model before it adapts among them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback

from prunepass.cli.outcome import _said
from prunepass.errors import WeightsError
from prunepass.training.data.options import Goal, Source, TrainOptions
from prunepass.training.loop import recipe
from prunepass.training.loop.conduct import _find_best
from prunepass.training.loop.outcome import Outcome, Taken
from prunepass.training.loop.output import checkpoints_of
from prunepass.training.loop.prepare import prepare_training
from prunepass.training.loop.trainer import PruneTrainer
from vocabulary import save_model

WORDS = ("the", "cat", "sat", "on", "mat", "good", "bad", "film", "who", "where")
KEEPS_BEST = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 5,
    "eval_steps": 5,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": False,
    "save_total_limit": 2,
}


# -- the Trainer ----------------------------------------------------------------------------------------------------


def test_a_model_that_adapting_makes_worse_is_taken_as_it_was(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=20, arguments={**KEEPS_BEST, "learning_rate": 0.3, "warmup_steps": 3})
    before = {name: value.clone() for name, value in made.student.model.state_dict().items()}
    made.train()
    looked = [entry["step"] for entry in made.state.log_history if "eval_loss" in entry]
    assert looked == [4, 5, 10, 15, 20]  # 3 of 20 steps rank; the first one after them leaves the model as it was
    assert made.state.best_global_step == 4
    for name, value in made.student.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert made.plan is not None
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-20"}


def test_a_best_state_between_two_checkpoints_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {4: 5.0, 5: 4.0, 10: 1.0, 15: 3.0, 20: 2.0}
    arguments = {**KEEPS_BEST, "save_steps": 20, "warmup_steps": 3}
    made = trainer(tmp_path, steps=20, arguments=arguments)
    monkeypatch.setattr(made, "_evaluate", lambda *args: {"eval_loss": losses[made.state.global_step]})
    made.train()
    assert made.state.best_global_step == 10
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


def test_a_delay_of_evaluations_holds_for_the_first_state_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=10, arguments={**KEEPS_BEST, "eval_delay": 8})
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "eval_loss" in entry] == [10]


def test_the_dense_model_is_no_state_to_choose(tmp_path: Path) -> None:
    arguments = {**KEEPS_BEST, "learning_rate": 0.3, "warmup_steps": 3, "eval_on_start": True}
    made = trainer(tmp_path, steps=10, arguments=arguments)
    made.train()
    looked = [entry["step"] for entry in made.state.log_history if "eval_loss" in entry]
    assert looked == [0, 3, 5, 10]
    assert made.state.best_global_step == 3
    assert made.plan is not None


def test_checkpoints_that_were_moved_are_found(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first", steps=20, arguments={**KEEPS_BEST, "learning_rate": 0.3, "warmup_steps": 3})
    first.train()
    (tmp_path / "first").rename(tmp_path / "moved")
    again = trainer(tmp_path / "moved", steps=20, arguments={**KEEPS_BEST, "learning_rate": 0.3, "warmup_steps": 3})
    again.load_checkpoint(tmp_path / "moved" / "checkpoint-20")
    last = {name: value.clone() for name, value in again.student.state_dict().items()}
    again.load_best()
    best = first.student.state_dict()
    assert any(not torch.equal(value, last[name]) for name, value in best.items())
    for name, value in again.student.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=0, atol=0)


def test_the_best_of_a_folder_that_was_moved_is_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    args = SimpleNamespace(load_best_model_at_end=True, output_dir=str(tmp_path))
    for step, wanted in ((5, str(tmp_path / "checkpoint-5")), (10, None), (None, None)):
        state = SimpleNamespace(best_model_checkpoint=None, best_global_step=step)
        _find_best(args, state)
        assert state.best_model_checkpoint == wanted


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "classifier"))


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.csv", 48, seed=0)
    write(folder / "validation.csv", 24, seed=1)
    return folder


def write(path: Path, count: int, *, seed: int, labelled: bool = True) -> None:
    generator = torch.Generator().manual_seed(seed)
    lines = ["text,label"] if labelled else ["text"]
    for _ in range(count):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator).tolist()]
        label = ",good" if "good" in words[:4] else ",bad"
        lines.append(" ".join(words) + (label if labelled else ""))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def options(model: str, data: Path, out: Path, **more: Any) -> TrainOptions:
    quick = {"epochs": 4.0, "method": "sdtp", "batch_size": 8, "learning_rate": 0.3}
    given = {"validation": Source(str(data / "validation.csv")), **quick, **more}
    return TrainOptions(model, Source(str(data / "train.csv")), out, Goal(share=0.5), **given)


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = outcome.model.state_dict()
    return {name: value.clone() for name, value in found.items()}


def test_train_takes_the_best_state_and_says_which(model: str, data: Path, tmp_path: Path) -> None:
    asked = options(model, data, tmp_path / "out")
    ready = prepare_training(asked)
    assert ready.validation is not None
    assert (len(ready.train), len(ready.evaluation), len(ready.validation)) == (43, 5, 24)
    outcome = recipe.train(asked, ready)
    taken = outcome.taken
    assert taken is not None
    assert (taken.figure, taken.rows) == ("accuracy", 24)
    assert taken.values[taken.step] == max(taken.values.values())
    assert len(taken.values) > 3
    run = json.loads(json.dumps(outcome.to_dict()))
    assert run["data"]["validation"]["rows"] == 24
    assert run["taken"]["step"] == taken.step
    assert run["options"]["validation"]["name"].endswith("validation.csv")

    # a run that ended before its folder was written goes on with the same state
    again = recipe.train(replace(asked, resume=True), prepare_training(replace(asked, resume=True)))
    assert again.taken == taken
    first = weights(outcome)
    for name, value in weights(again).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)


def test_a_run_goes_on_with_the_validation_rows_it_began_with(model: str, data: Path, tmp_path: Path) -> None:
    asked = options(model, data, tmp_path / "out", epochs=1.0)
    recipe.train(asked, prepare_training(asked))
    write(tmp_path / "other.csv", 30, seed=2)
    for validation in (None, Source(str(tmp_path / "other.csv"))):
        changed = replace(asked, resume=True, epochs=2.0, validation=validation)
        with pytest.raises(
            WeightsError, match=r"written with validation '24 rows of .*validation.csv', but here it is"
        ):
            recipe.train(changed, prepare_training(changed))


def test_without_labels_the_nearest_to_the_unpruned_model_is_best(model: str, data: Path, tmp_path: Path) -> None:
    write(tmp_path / "unlabelled.csv", 24, seed=1, labelled=False)
    asked = options(model, data, tmp_path / "out", validation=Source(str(tmp_path / "unlabelled.csv")))
    outcome = recipe.train(asked, prepare_training(asked))
    taken = outcome.taken
    assert taken is not None
    assert taken.figure == "loss"
    assert taken.values[taken.step] == min(taken.values.values())
    assert taken.unadapted
    assert not taken.is_last
    original = AutoModelForSequenceClassification.from_pretrained(model).state_dict()
    for name, value in weights(outcome).items():
        torch.testing.assert_close(value, original[name], rtol=0, atol=0)


def test_train_takes_the_last_state_where_there_is_nothing_to_choose_by(model: str, data: Path, tmp_path: Path) -> None:
    asked = options(model, data, tmp_path / "out", validation=None, epochs=2.0)
    ready = prepare_training(asked)
    assert ready.validation is None
    outcome = recipe.train(asked, ready)
    assert outcome.taken is None
    assert len(list(checkpoints_of(tmp_path / "out").glob("checkpoint-*"))) == 1
    original = AutoModelForSequenceClassification.from_pretrained(model).state_dict()
    assert any(not torch.equal(value, original[name]) for name, value in weights(outcome).items())


def test_few_rows_to_choose_by_are_told_of(
    model: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_training(options(model, data, tmp_path / "out"))
    assert "24 rows to choose a checkpoint by are few" in caplog.text
    assert "give others" not in caplog.text
    source = Source(str(data / "train.csv"))
    prepare_training(options(model, data, tmp_path / "out", validation=source))
    assert "The rows to choose a checkpoint by are those trained on: give others." in caplog.text
    other = Source(str(data / "validation.csv"))
    prepare_training(options(model, data, tmp_path / "out", validation=other, eval_data=other))
    assert "The rows to choose a checkpoint by are those reported on: give others." in caplog.text


class _Stopping(TrainerCallback):
    """Ctrl-C, as `Stop` takes it."""

    def __init__(self, made: PruneTrainer, step: int) -> None:
        self.made, self.step = made, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.made.conductor.stop.asked = True
            control.should_save = control.should_training_stop = True


def test_a_run_that_was_stopped_keeps_its_last_checkpoint_beside_the_best(tmp_path: Path) -> None:
    arguments = {**KEEPS_BEST, "learning_rate": 0.3, "warmup_steps": 3}
    whole = trainer(tmp_path / "whole", steps=20, arguments=arguments)
    whole.train()
    made = trainer(tmp_path / "stopped", steps=20, arguments=arguments)
    made.add_callback(_Stopping(made, 13))
    made.train()
    assert {p.name for p in (tmp_path / "stopped").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-13"}
    again = trainer(tmp_path / "stopped", steps=20, arguments=arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-13"))
    assert again.state.best_global_step == 4
    shutil.rmtree(tmp_path / "stopped")
    for name, value in again.student.state_dict().items():
        torch.testing.assert_close(value, whole.student.state_dict()[name], rtol=0, atol=0)


# -- what is said ---------------------------------------------------------------------------------------------------


def test_what_is_said_of_the_state_taken() -> None:
    near = Taken(16, 16, "loss", {16: 0.25}, rows=50)
    assert "(distance from the unpruned model's answers 0.2500)" in _said(near)
    taken = Taken(40, 120, "accuracy", {16: 0.5, 40: 0.75, 120: 0.25}, rows=1000)
    assert _said(taken) == (
        "Taken: the state after step 40 of 120, the best of 3 on 1,000 validation rows (accuracy 0.7500; 0.2500 at the "
        "end)."
    )
    first = Taken(16, 120, "loss", {16: 0.2, 120: 0.75}, rows=50, unadapted=True)
    assert _said(first).endswith("as they were: adapting made it no better on these rows. Try a lower --lr.")
    assert _said(replace(taken, step=120)).endswith("(accuracy 0.2500). It is the last one.")
