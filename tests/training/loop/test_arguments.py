"""Every field of transformers' ``TrainingArguments``: it works, never reaches the model, or is refused by its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import rows, trainer
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import zoo
from prunepass.errors import ExportError, OptionError
from prunepass.training.loop.arguments import ASIDE, REFUSED, WORKS, check_arguments
from prunepass.training.loop.trainer import PruneTrainer

FIELDS = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}

#: arguments that are tried together on a tiny model, and what must be so after training
GROUPS: dict[str, dict[str, Any]] = {
    "steps": {
        "num_train_epochs": 2.0, "max_steps": -1, "gradient_accumulation_steps": 2, "dataloader_drop_last": True,
        "average_tokens_across_devices": False, "max_grad_norm": 0.5, "warmup_steps": 2, "weight_decay": 0.01,
        "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "optim": "adafactor", "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "torch_empty_cache_steps": 2, "seed": 3, "data_seed": 5, "include_num_input_tokens_seen": "non_padding",
        "train_sampling_strategy": "group_by_length", "length_column_name": "length", "per_device_train_batch_size": 4,
        "optim_args": None, "logging_first_step": True, "logging_steps": 3, "tf32": False, "skip_memory_metrics": False,
    },
    "evaluation": {
        "bf16": True, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 1,
        "eval_on_start": True, "per_device_eval_batch_size": 4, "eval_accumulation_steps": 1,
        "eval_use_gather_object": True, "include_for_metrics": ["inputs", "loss"], "save_strategy": "steps",
        "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True,
        "save_only_model": True, "enable_jit_checkpoint": True, "restore_callback_states_from_checkpoint": True,
        "ignore_data_skip": True, "logging_strategy": "steps", "logging_steps": 0.5, "logging_nan_inf_filter": False,
        "disable_tqdm": False, "auto_find_batch_size": True,
    },
    "data": {
        "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2,
        "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False, "dataloader_pin_memory": False,
        "remove_unused_columns": False, "label_names": ["labels"], "prediction_loss_only": True,
        "train_sampling_strategy": "sequential", "accelerator_config": {"split_batches": True, "non_blocking": False},
        "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 1e-3, "fp16": False,
        "logging_strategy": "epoch", "eval_do_concat_batches": True, "batch_eval_metrics": False, "output_dir": None,
        "report_to": None, "full_determinism": False,
        "ddp_bucket_cap_mb": 10, "ddp_broadcast_buffers": False, "ddp_timeout": 600,
        "ddp_find_unused_parameters": True,
    },
}  # fmt: skip

REFUSED_VALUES: list[dict[str, Any]] = [
    {"gradient_checkpointing": True},
    {"activation_checkpointing": True},
    {"torch_compile": True},
    {"torch_compile_backend": "eager"},
    {"torch_compile_mode": "reduce-overhead"},
    {"use_liger_kernel": True},
    {"neftune_noise_alpha": 5.0},
    {"label_smoothing_factor": 0.1},
    {"use_cache": True},
    {"bf16_full_eval": True},
    {"fp16_full_eval": True},
    {"fp16": True},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    {"lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
    {"lr_scheduler_kwargs": {"num_cycles": 2}},
    {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
    {"optim": "lomo"},
    {"optim": "apollo_adamw", "optim_target_modules": "all-linear"},
    {"fsdp": "full_shard"},
    {"ddp_find_unused_parameters": False},
    {"ddp_static_graph": True},
    {"debug": "underflow_overflow"},
    {"push_to_hub": True},
    {"report_to": "nowhere"},
    {"report_to": "wandb"},
    {"sortish_sampler": True},
    {"predict_with_generate": True},
    {"generation_max_length": 9},
    {"generation_num_beams": 2},
    {"generation_config": "somewhere"},
    {"label_names": ["start_positions"]},
    {"batch_eval_metrics": True},
    {"eval_do_concat_batches": False},
    {"optim": "adamw_bnb_8bit"},
    {"lr_scheduler_kwargs": {"no_such": 1}, "lr_scheduler_type": "cosine"},
    {"num_train_epochs": 0.0},
    {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
]


def arguments(**given: Any) -> Any:
    kind = TrainingArguments if set(given) <= {f.name for f in dataclasses.fields(TrainingArguments)} else None
    return (kind or Seq2SeqTrainingArguments)(**{"output_dir": "unused", "use_cpu": True, "report_to": "none"} | given)


def test_every_field_of_this_version_is_declared_once() -> None:
    declared = [*WORKS, *ASIDE, *REFUSED]
    assert len(declared) == len(set(declared))
    assert set(declared) >= FIELDS, sorted(FIELDS - set(declared))
    tried = {name for group in GROUPS.values() for name in group}
    assert tried >= WORKS - {"ddp_backend"}, sorted(WORKS - tried)  # that is for several processes
    assert {name for given in REFUSED_VALUES for name in given} >= REFUSED.keys() - {"deepspeed", "parallelism_config"}


@pytest.mark.parametrize("given", REFUSED_VALUES, ids=lambda g: "-".join(f"{k}={v}" for k, v in g.items()))
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny("bert", "sequence", dtype=torch.float32)
    monkeypatch.setattr("prunepass.training.loop.trainer.Student", _traced)
    if missing := given.keys() - {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}:
        pytest.skip(f"this version of transformers has no {', '.join(sorted(missing))}")
    try:
        args = arguments(**given)
    except (ValueError, ImportError) as error:  # transformers itself refuses it on this machine, or in this version
        pytest.skip(str(error))
    named = "lr_scheduler_kwargs" if "lr_scheduler_kwargs" in given else next(iter(given))
    with pytest.raises(OptionError, match=named):
        PruneTrainer(model, _config(), args, data_collator=dict, train_dataset=rows(16))


def _traced(*args: Any) -> Any:
    raise AssertionError("it was traced before its arguments were looked at")


def _config() -> Any:
    from prunepass.training.data.options import Goal
    from prunepass.training.loop.config import PruneConfig

    return PruneConfig(Goal(share=0.5))


@pytest.mark.parametrize(("name", "value"), [("deepspeed", {"zero": 1}), ("parallelism_config", object())])
def test_what_needs_other_packages_is_refused_as_well(name: str, value: Any) -> None:
    args = arguments()
    vars(args)[name] = value
    with pytest.raises(OptionError, match=name):
        check_arguments(args, ("labels",), own_metrics=False, rows=9)


def test_a_field_of_another_version_is_let_through() -> None:
    args = arguments()
    vars(args)["brand_new"] = True
    check_arguments(args, ("labels",), own_metrics=False, rows=9)
    older = {k: v for k, v in vars(args).items() if k not in ("activation_checkpointing", "use_liger_kernel")}
    known = {name: getattr(args, name) for name in ("n_gpu", "train_batch_size", "world_size", "device")}
    check_arguments(SimpleNamespace(**(older | known)), ("labels",), own_metrics=False, rows=9)


@pytest.mark.parametrize("group", [pytest.param(g, marks=pytest.mark.slow) if g == "steps" else g for g in GROUPS])
def test_what_works_works(group: str, tmp_path: Path) -> None:
    given = {k: v for k, v in GROUPS[group].items() if k not in ("output_dir", "report_to")}
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, **{"max_steps": 6, **_rest(given)}
    )
    before = dict(vars(args))
    made = trainer(tmp_path, arguments=args)
    assert {k: v for k, v in vars(args).items() if k in before} == before, "the caller's arguments stay as they are"
    weights = {k: v.clone() for k, v in made.student.model.state_dict().items()}
    made.train()
    assert made.plan is not None
    assert any(not torch.equal(v, weights[k]) for k, v in made.student.model.state_dict().items())
    history = made.state.log_history
    assert all(e["eval_loss"] == e["eval_loss"] for e in history if "eval_loss" in e)
    _CHECKS[group](made)


def _rest(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k != "use_cpu"}


def _steps(made: PruneTrainer) -> None:
    assert made.state.global_step == 12  # 48 rows, 4 a batch, 2 batches a step, 2 epochs
    assert made.state.num_input_tokens_seen == 2 * sum(len(row["input_ids"]) for row in rows())
    rates = [e["learning_rate"] for e in made.state.log_history if "learning_rate" in e]
    assert rates[-1] >= 1e-4, "the least rate of the schedule"


def _evaluated(made: PruneTrainer) -> None:
    evaluated = [e["step"] for e in made.state.log_history if "eval_loss" in e]
    assert evaluated[0] == 0, "eval_on_start"
    assert evaluated[-1] == 6
    assert made.state.best_model_checkpoint is not None


def _data(made: PruneTrainer) -> None:
    inner: Any = made.optimizer
    assert isinstance(inner.optimizer, torch.optim.SGD)
    assert {e["learning_rate"] for e in made.state.log_history if "learning_rate" in e} == {1e-3}


_CHECKS: dict[str, Callable[[PruneTrainer], None]] = {
    "steps": _steps,
    "evaluation": _evaluated,
    "data": _data,
}


@pytest.mark.slow
def test_a_batch_size_that_is_too_large_is_halved(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=6, arguments={"auto_find_batch_size": True})
    forward = made.student.forward

    def full(**batch: Any) -> dict[str, Any]:
        if made.student.training and len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**batch)

    made.student.forward = full  # type: ignore[method-assign]
    made.train()
    assert made.plan is not None
    assert made.state.global_step == 6


def test_options_of_the_trainer_that_would_not_be_used_are_refused(tmp_path: Path) -> None:
    model = zoo.tiny("bert", "sequence", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name, value in {"optimizers": (optimizer, None), "model_init": zoo.tiny, "compute_loss_func": print}.items():
        with pytest.raises(OptionError, match=name):
            PruneTrainer(model, _config(), data_collator=dict, train_dataset=rows(4), **{name: value})


def test_an_optimizer_of_ones_own_trains_every_part(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=6, optimizer_cls_and_kwargs=(torch.optim.NAdam, {"lr": 1e-3, "eps": 1e-7}))
    before = {k: v.clone() for k, v in made.student.state_dict().items()}
    made.train()
    inner: Any = made.optimizer
    assert isinstance(inner.optimizer, torch.optim.NAdam)
    moved = {re.split(r"[.]", k)[0] for k, v in made.student.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"model", "predictors"}


def test_a_checkpoint_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = object.__new__(PruneTrainer)
    made.args, made.state = SimpleNamespace(output_dir="somewhere"), SimpleNamespace(global_step=7)  # type: ignore[assignment]

    def failing(error: Exception) -> None:
        def save(*args: Any) -> None:
            raise error

        monkeypatch.setattr("transformers.Trainer._save_checkpoint", save)
        made._save_checkpoint(torch.nn.Identity(), None)

    for full in (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ):
        with pytest.raises(ExportError, match=r"step 7 could not be written to somewhere.*earlier ones stay"):
            failing(full)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing(RuntimeError("out of memory"))


@pytest.mark.parametrize(("has", "bf16"), [(True, True), (False, True), (False, False)])
def test_bfloat16_is_warned_of_where_the_cpu_has_none(
    has: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prunepass.training.loop.arguments.has_bf16", lambda: has)
    check_arguments(arguments(bf16=bf16), ("labels",), own_metrics=False, rows=8)
    assert ("Leave it out" in caplog.text) is (bf16 and not has)
