"""What `PruneTrainer` does with each field of transformers' ``TrainingArguments``: one declaration for all of them.

Three kinds: *works* (reaches training and means what it means in transformers), *aside* (names, logs, the hub's
credentials: never reaches the model), and *refused*, each with the values that are refused and the reason. A field that
another version of transformers brings stands in none of them and is let through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunepass.errors import OptionError, option

__all__ = ["ASIDE", "REFUSED", "WORKS", "Refusal", "check_arguments", "check_options", "check_reports", "has_bf16"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Values of one field that are refused.

    Attributes:
        why: one or two sentences: the reason, and what to do.
        when: whether the arguments are refused, from all of them; where left out, any value that is set.
    """

    why: str
    when: Callable[[Any], bool] | None = None

    def applies(self, name: str, args: Any) -> bool:
        """Whether this field of ``args`` is refused."""
        return bool(getattr(args, name)) if self.when is None else self.when(args)


#: the learning rate of the model follows one of these from the step at which the model begins to learn
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
#: optimisers that rewrite, or hook into, the layers of a model in its own code
_NEEDS_LAYERS = ("galore", "apollo", "lomo", "adalomo")

_CHECKPOINTING = Refusal(
    "gradient_checkpointing, or activation_checkpointing, works inside a model's own code, and training runs traced "
    "graphs, which have none of it. Leave it out; smaller batches with gradient_accumulation_steps save memory, too."
)
_COMPILED = (
    "training switches between graphs of one model, which torch.compile would compile anew each time. Leave it out "
    "(torch_compile_backend and torch_compile_mode turn it on, too); the pruned model can be compiled after training."
)
_WHOLE = (
    "it takes a model's parameters apart, which a traced graph needs whole. Train with plain data parallelism: "
    "torchrun, or accelerate launch without it."
)
_GENERATES = Refusal("PruneTrainer does not generate in evaluation. Leave it out, or take plain TrainingArguments.")

REFUSED: Mapping[str, Refusal] = {
    "gradient_checkpointing": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "torch_compile_mode": Refusal(_COMPILED),
    "torch_compile": Refusal(_COMPILED),
    "torch_compile_backend": Refusal(_COMPILED),
    "use_liger_kernel": Refusal(
        "it replaces layers in a model's own code, and training runs traced graphs, which would not see them."
    ),
    "neftune_noise_alpha": Refusal(
        "its noise is a hook on the embedding layer, and traced graphs call no hooks. Leave it out.",
        lambda args: args.neftune_noise_alpha is not None,
    ),
    "label_smoothing_factor": Refusal(
        "the losses are distances from the unpruned model's answers, which no label enters to be smoothed. Leave it "
        "out; a teacher that was trained with smoothed labels passes them on.",
        lambda args: args.label_smoothing_factor != 0,
    ),
    "use_cache": Refusal("models are traced for training without a key-value cache. Leave it out."),
    "bf16_full_eval": Refusal(
        "it would turn the weights that are trained into bfloat16 for good. bf16=True evaluates in bfloat16 and keeps "
        "the weights as they are."
    ),
    "fp16_full_eval": Refusal(
        "it would turn the weights that are trained into float16 for good. fp16=True, or bf16=True, evaluates in half "
        "precision and keeps the weights as they are."
    ),
    "fp16": Refusal(
        "float16 takes a GPU, and training runs on the CPU here. Leave it out, or take bf16=True "
        "where the CPU has AVX-512 or AMX.",
        lambda args: args.fp16 and args.device.type == "cpu",
    ),
    "lr_scheduler_type": Refusal(
        "it goes by figures of evaluations, of which there are none before a plan is found, and moves the rates of "
        'predictors and model together. Take one that goes by steps, such as "linear" or "cosine".',
        lambda args: _value(args.lr_scheduler_type) in _BY_METRIC,
    ),
    "lr_scheduler_kwargs": Refusal(
        'the linear schedule takes none. Name the schedule that they belong to, such as lr_scheduler_type="cosine".',
        lambda args: bool(args.lr_scheduler_kwargs) and _value(args.lr_scheduler_type) == "linear",
    ),
    "optim": Refusal(
        "it works inside the layers of a model's own code, and training runs traced graphs. Take an optimiser that "
        'knows parameters only, such as "adamw_torch" or "adafactor".',
        lambda args: _value(args.optim).startswith(_NEEDS_LAYERS),
    ),
    "fsdp": Refusal(_WHOLE),
    "deepspeed": Refusal(_WHOLE),
    "parallelism_config": Refusal(_WHOLE),
    "ddp_find_unused_parameters": Refusal(
        "each phase trains other parts, so some parameters get no gradient. Leave it out.",
        lambda args: args.ddp_find_unused_parameters is False,
    ),
    "ddp_static_graph": Refusal("each phase of training runs another graph. Leave it out."),
    "debug": Refusal(
        "underflow_overflow looks at the layers of a model's own code, and training runs traced graphs, of which it "
        "would see nothing.",
        lambda args: "underflow_overflow" in [_value(option) for option in args.debug or ()],
    ),
    "push_to_hub": Refusal(
        "PruneTrainer writes folders only. Leave it out, and upload the folder of save_model or of a checkpoint with "
        "huggingface_hub.upload_folder."
    ),
    "sortish_sampler": Refusal('Take train_sampling_strategy="group_by_length" instead.'),
    "predict_with_generate": _GENERATES,
    "generation_max_length": _GENERATES,
    "generation_num_beams": _GENERATES,
    "generation_config": _GENERATES,
}

#: mean in training what they mean in transformers; of those in `REFUSED`, too, the values that are not refused
WORKS = frozenset({
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "warmup_steps",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps",
    "average_tokens_across_devices", "max_grad_norm", "bf16", "tf32", "torch_empty_cache_steps",
    "auto_find_batch_size", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
    "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
    "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "save_only_model", "save_strategy",
    "save_steps", "save_total_limit", "enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "seed",
    "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "remove_unused_columns", "label_names",
    "train_sampling_strategy", "length_column_name", "skip_memory_metrics", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout", "disable_tqdm", "report_to",
})  # fmt: skip

#: never reach the model: options of those above or below that are off, names, logs, the hub, flags for scripts
ASIDE = frozenset({
    "optim_target_modules", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "liger_kernel_config",
    "fsdp_config", "log_on_each_node", "log_level", "log_level_replica", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_on_each_node", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "do_train", "do_eval",
    "do_predict", "resume_from_checkpoint", "local_rank",
})  # fmt: skip

#: arguments of the Trainer itself that would be left unused, or go around what is trained
_TRAINER_REFUSED = {
    "model_init": "the model is traced once, when the trainer is made. Make a trainer for each model.",
    "optimizers": "the parameters of predictors and gates are made by PruneTrainer, so an optimiser made before does "
    "not know them. Give optimizer_cls_and_kwargs, or the optim of TrainingArguments.",
    "compute_loss_func": "each phase has its own loss. The share of the loss on labels is task_weight of PruneConfig.",
}


def check_arguments(args: Any, label_keys: tuple[str, ...], *, own_metrics: bool, rows: int) -> None:
    """Refuse what cannot work, by name and before anything is traced.

    Args:
        args: ``TrainingArguments`` of any version, or of a subclass.
        label_keys: the head's labels.
        own_metrics: whether ``compute_metrics`` was given.
        rows: of the training data.

    Raises:
        OptionError: a field has a value that cannot work here.
    """
    for name, refusal in REFUSED.items():
        if hasattr(args, name) and refusal.applies(name, args):
            raise OptionError(f"{name}={_shown(getattr(args, name))}: {refusal.why}")
    if args.n_gpu > 1:
        raise OptionError("Several GPUs in one process are not supported; start one process each with torchrun.")
    check_reports("report_to", args.report_to)
    _check_label_names(args, label_keys)
    _check_metrics(args, own_metrics)
    _check_steps(args, rows)
    if args.bf16 and args.device.type == "cpu" and not has_bf16():
        logger.warning(
            "%s: this CPU has no instructions for bfloat16, and a matrix product takes some ten times as long in it as "
            "in float32. Leave it out.",
            option("bf16"),
        )


def has_bf16() -> bool:
    """Whether oneDNN, which computes torch's matrix products on CPUs, has kernels in bfloat16 for this one; True, too,
    where torch was built without it, as nothing is known then."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of the Trainer that would not be used.

    Raises:
        OptionError: one of them is given.
    """
    for name, why in _TRAINER_REFUSED.items():
        value = given.get(name)
        if value is not None and value != (None, None):
            raise OptionError(f"{name}: {why}")


def check_reports(asked_by: str, names: str | list[str] | None) -> None:
    """Refuse to log to what is not known, or whose package is missing.

    Args:
        asked_by: name of the option, for the message.
        names: as ``report_to`` takes them.

    Raises:
        OptionError: with transformers' reason.
    """
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    chosen = [names] if isinstance(names, str) else list(names or ())
    for name in (n for n in chosen if n not in ("none", "all")):
        try:
            for made in get_reporting_integration_callbacks([name]):
                made()
        except (ValueError, RuntimeError, ImportError, AssertionError) as e:
            raise OptionError(f"{option(asked_by, name)}: {e}") from None


def _check_label_names(args: Any, label_keys: tuple[str, ...]) -> None:
    names = args.label_names
    if names is not None and list(names) != list(label_keys):
        known = f"the labels {', '.join(label_keys)}" if label_keys else "no labels"
        raise OptionError(f"label_names={list(names)}: the model's head learns from {known}. Leave it out.")


def _check_metrics(args: Any, own: bool) -> None:
    """The head's own metrics take all rows at once, in one array."""
    wrong = {"batch_eval_metrics": args.batch_eval_metrics, "eval_do_concat_batches": not args.eval_do_concat_batches}
    for name, is_set in wrong.items():
        if is_set and not own:
            raise OptionError(
                f"{name}={getattr(args, name)}: the metrics that come with the model's head look at all rows at once. "
                "Leave it out, or give compute_metrics."
            )


def _check_steps(args: Any, rows: int) -> None:
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise OptionError(f"num_train_epochs={args.num_train_epochs}: there would be no step of training.")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise OptionError(
            f"dataloader_drop_last=True: the {rows} rows of the train_dataset fill no batch of {batch}, so all of them "
            "would be dropped."
        )


def _value(option: Any) -> str:
    return str(getattr(option, "value", option))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(v) for v in value)
    value = getattr(value, "value", value)
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__}(...)"
