"""What a checkpoint of `PruneTrainer` holds: enough to go on, to deploy, and to be told from another model's."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import collate, rows, trainer
from transformers import EarlyStoppingCallback, TrainerCallback

import prunepass
import zoo
from prunepass.errors import PlanError, WeightsError
from prunepass.training.loop.progress import Silent, Stop, Telling
from prunepass.training.loop.trainer import PruneTrainer


def weights(made: PruneTrainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in made.student.state_dict().items()}


def bitwise_equal(one: PruneTrainer, other: PruneTrainer) -> None:
    mine, theirs = weights(one), weights(other)
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="spread"),
        pytest.param({"search": "measure"}, id="measure", marks=pytest.mark.slow),
        pytest.param({"method": "top"}, id="top", marks=pytest.mark.slow),
    ],
)
def test_going_on_from_a_checkpoint_ends_where_an_unbroken_run_does(options: dict[str, Any], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "train_sampling_strategy": "group_by_length"}
    whole = trainer(tmp_path / "whole", arguments=saving, **options)
    whole.train()
    again = trainer(tmp_path / "again", arguments=saving, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert again.plan is not None
    assert whole.plan is not None
    assert again.plan.stages == whole.plan.stages
    bitwise_equal(again, whole)


def test_a_checkpoint_deploys_by_itself(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 10})
    made.train()
    folder = tmp_path / "checkpoint-10"
    model = type(made.student.model).from_pretrained(folder).eval()
    inputs = {k: v for k, v in collate(rows(3)).items() if k != "labels"}
    pruned = prunepass.prune(model, str(folder), inputs)
    made.student.eval()
    with torch.no_grad():
        torch.testing.assert_close(pruned(**inputs).logits, made.student(**inputs)["logits"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2, arguments={"save_strategy": "steps", "save_steps": 2})
    made.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer(tmp_path / "other", model=zoo.tiny("bert", "sequence", num_hidden_layers=3).float())
    with pytest.raises(WeightsError, match="blocks 4, but here it is 3"):
        other.train(resume_from_checkpoint=checkpoint)
    dearer = trainer(tmp_path / "dearer", share=0.6)
    with pytest.raises(WeightsError, match="goal"):
        dearer.train(resume_from_checkpoint=checkpoint)
    another = trainer(tmp_path / "another", method="sdtp")
    with pytest.raises(WeightsError, match="method 'both', but here it is 'sdtp'"):
        another.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-2" / "prunepass_training.json").unlink()
    with pytest.raises(PlanError, match="no prunepass checkpoint"):
        trainer(tmp_path / "third").train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_early_stopping_takes_back_the_best_state(tmp_path: Path) -> None:
    watched = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 4,
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "learning_rate": 0.1,
    }
    made = trainer(tmp_path, steps=40, arguments=watched)
    # no gain is large enough to go on for, so it stops at the third evaluation
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e6))
    made.train()
    assert made.state.global_step < 40
    best = made.state.best_model_checkpoint
    assert best is not None
    notes = json.loads((Path(best) / "prunepass_training.json").read_text())
    assert [p.to_dict() for p in made.student.plans] == notes["plans"]
    saved = type(made.student.model).from_pretrained(best).state_dict()
    for name, value in made.student.model.state_dict().items():
        torch.testing.assert_close(value, saved[name])


# -- stopped and gone on with ----------------------------------------------------------------------------------------


class StoppedAt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 9])  # in the phase that ranks; in the second epoch, while the model adapts
def test_a_training_that_was_stopped_ends_as_an_undisturbed_one(step: int, tmp_path: Path) -> None:
    """In the middle of an epoch, with rows grouped by length, and gradients gathered over two batches."""
    arguments = {
        "save_strategy": "epoch",
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    options = {"steps": 12, "search": "measure", "max_evaluations": 12, "rank_steps": 0.4}
    whole = trainer(tmp_path / "whole", arguments=arguments, **options)
    whole.train()
    stopped, stop = trainer(tmp_path / "stopped", arguments=arguments, **options), Stop()
    stopped.conductor.stop = stop
    for callback in (Telling(stopped, Silent(), stop), StoppedAt(step)):
        stopped.add_callback(callback)
    with stop.watching(), stop.waiting(True):
        stopped.train()
    assert stop.asked
    assert stopped.state.global_step == step + 1
    again = trainer(tmp_path / "stopped", arguments=arguments, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{step + 1}"))
    assert again.student.plans == whole.student.plans
    bitwise_equal(again, whole)


def test_a_search_is_never_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 10, "search": "measure", "max_evaluations": 12, "arguments": {"save_strategy": "epoch"}}
    made, told = trainer(tmp_path, **options), Told()
    made.conductor.progress = told
    monkeypatch.setattr("prunepass.training.loop.conduct.search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    monkeypatch.undo()
    before = tmp_path / "checkpoint-2"
    assert (before / "trainer_state.json").is_file(), "one lies before the search"
    again = trainer(tmp_path, **options)
    again.conductor.progress = told = Told()
    again.add_callback(StopAfter(4))
    again.train(resume_from_checkpoint=str(before))
    assert told.begun == [("searching", 12)]
    assert 0 < told.steps <= 12
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file(), "and one behind it"
    monkeypatch.setattr("prunepass.training.loop.conduct.search", interrupted)
    last = trainer(tmp_path, **options)
    last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last.student.plans == again.student.plans
    assert last.student.searches == json.loads(json.dumps(again.student.searches))


def interrupted(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


class StopAfter(TrainerCallback):
    """Ends a training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class Told:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.steps = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.begun.append((what, total))

    def step(self, what: str) -> None:
        self.steps += 1

    def end(self) -> None: ...
