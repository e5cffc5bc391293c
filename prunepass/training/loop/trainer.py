"""`PruneTrainer`: transformers' Trainer, for models that learn to be pruned."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from prunepass.cost.blocks import BlockCosts
from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.errors import DataError, ExportError, OptionError
from prunepass.plan import PrunePlan, Stage
from prunepass.training.data.features import data_collator as data_collator_of
from prunepass.training.data.heads import Head, head_of
from prunepass.training.data.media import MediaCollator, Tokens, tokens_of
from prunepass.training.data.options import FLOPS
from prunepass.training.data.sounds import Sounds
from prunepass.training.loop.arguments import check_arguments, check_options
from prunepass.training.loop.checkpoint import load_student, save_student
from prunepass.training.loop.conduct import Conductor
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.processes import world_size
from prunepass.training.loop.rates import optimizer_of, schedule
from prunepass.training.loop.student import Student
from prunepass.training.methods.schedules import shortfall

__all__ = ["PruneTrainer"]

logger = logging.getLogger(__name__)


class PruneTrainer(Trainer):
    """Trains predictors, finds where and how much to prune, and lets the model adapt to it.

    Most of `transformers.Trainer` works as usual: mixed precision, resuming, early stopping, logging, several processes
    through accelerate. What does not is refused by its name (`training.arguments`). ``train_dataset`` needs no labels;
    the unpruned model teaches. Its rows hold what the model reads: ``input_ids``, ``pixel_values`` of one size,
    ``input_features`` of one size or ``input_values``; waveforms of several lengths with an ``attention_mask`` over
    samples. The model's learning rate begins with the phase in which the model learns
    (`create_scheduler`), and nothing is evaluated before there is a plan, as it would be the dense model: but for
    ``eval_on_start``, which asks for that. With ``load_best_model_at_end`` the first state with a plan is looked at,
    too, which early stopping counts as an evaluation, unless there is an ``eval_delay``.

    Further arguments are those of the Trainer; the metrics of the head are the default for ``compute_metrics``.

    Args:
        model: to prune; trained in place unless ``prune.freeze_model``.
        prune: how.
        args: of the Trainer. Its learning rate is the model's; those of predictors and gates stand in ``prune``.
        teacher: learn from another (better trained) model of the same depth and width, with the same head and tokens.
        head: what the model's head predicts, where it cannot be told from the model (`training.heads.head_of`).
        calibration_dataset: rows that layers and shares are searched on, and whose lengths the budget is counted over;
            ``train_dataset`` where left out. Give the task's own where others' texts are among those to train on.
        costs: what the goal's cost is measured by; FLOPs where left out. `cost.latency.LatencyTable` for time.

    Attributes:
        plan: what was learned, with its predictors; None before it is decided.
        plans: the same for all budgets.
        student: the module that is trained, with the user's model as ``student.model``.

    Raises:
        CaptureError, RefusalError: the model cannot be pruned.
        OptionError, DataError: arguments that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        prune: PruneConfig,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher: nn.Module | None = None,
        head: Head | None = None,
        costs: CostModel | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args) if args else TrainingArguments(output_dir="prunepass-training")  # the caller's stay
        _check_rows(train_dataset, "train_dataset")
        check_options(kwargs)
        head = head or head_of(model)
        own_metrics = kwargs.get("compute_metrics") is not None
        check_arguments(args, head.label_keys, own_metrics=own_metrics, rows=len(train_dataset))
        _check_processes(args)
        schedule(args, 100, 10)
        if not kwargs.get("optimizer_cls_and_kwargs"):
            optimizer_of(args)
        if prune.plan is not None:
            prune = replace(prune, protect=prune.plan.protect, restore=prune.plan.restore)
        _check_goal(prune, costs)
        if data_collator is None and not head.makes_tokens:
            if processing_class is None:
                raise OptionError("PruneTrainer needs data_collator, or the tokenizer as processing_class to pad with.")
            data_collator = data_collator_of(head, processing_class, max_length=_longest(train_dataset))
        self.order = torch.Generator()  # of the rows, where they are grouped by length
        self.order_seed = 1_000_003 * (args.seed if args.data_seed is None else args.data_seed)
        self._read = [*head.inputs, *head.label_keys, "label", "label_ids"]
        if head.reads_sound:
            self._read.append("attention_mask")  # over samples
        set_seed(args.seed)  # the predictors' first weights are part of the run
        rows = [self._needed(train_dataset[i]) for i in range(min(2, len(train_dataset)))]
        if head.makes_tokens and not isinstance(data_collator, MediaCollator):
            data_collator = MediaCollator(_tokens_of(model, head, rows[0]), data_collator)
        self._made = data_collator.tokens if isinstance(data_collator, MediaCollator) else None
        assert data_collator is not None
        example = head.model_inputs(data_collator(rows))
        device = next(model.parameters()).device
        self.student = Student(model, head, prune, {k: v.to(device) for k, v in example.items()}, teacher)
        prune = self.student.settings  # with class and register tokens protected
        self.costs: CostModel = costs or self._flops()
        self.calibration_dataset = train_dataset if calibration_dataset is None else calibration_dataset
        _check_rows(self.calibration_dataset, "calibration_dataset")
        lengths = _lengths(self.calibration_dataset, self._made)
        prices = PlanCosts.over(self.costs, lengths, prune.protect, prune.leave)
        budgets = _budgets(prune, prices)
        _check_budget(min(budgets), self.student, prices)
        self.student.add_gates(min(budgets), self.costs)
        vars(args)["label_names"] = list(head.label_keys)  # declared without the type of its values
        args.ddp_find_unused_parameters = True  # each phase trains other parts
        kwargs.setdefault("compute_metrics", head.metrics if head.label_keys else None)
        kwargs.setdefault("preprocess_logits_for_metrics", head.compress)
        super().__init__(
            self.student,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise OptionError(
                "FSDP and DeepSpeed take a model's parameters apart, which a traced graph needs whole; train with "
                "plain data parallelism (torchrun, or accelerate launch without them)."
            )
        self._signature_columns = self._read  # type: ignore[assignment]  # declared without the type of its values
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False  # losses are means: the Trainer divides by the accumulated steps
        self.conductor = Conductor(self, budgets, lengths)
        self.add_callback(self.conductor)

    # -- results -------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> PrunePlan | None:
        """The plan that meets the goal, with its predictors."""
        return self.student.trained_plan() if self.student.plans else None

    @property
    def plans(self) -> list[PrunePlan]:
        """Plans for the goal and for each extra budget, in this order."""
        return [self.student.trained_plan(i) for i in range(len(self.student.plans))]

    def _flops(self) -> BlockCosts:
        student, settings = self.student, self.student.settings
        if not student.predictors:
            return BlockCosts.of(student.forms.graph, scorer=settings.ranker)
        rank = settings.lens_rank if settings.learns_lenses else 0
        costs = BlockCosts.of(student.forms.graph, scorer="norm")
        return costs.with_predictor(student.width, settings.predictor_width, rank, settings.predictor_positions)

    # -- data ----------------------------------------------------------------------------------------------------

    def _needed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k in self._read}

    def _tokens_in(self, row: Mapping[str, Any]) -> int:
        return len(row["input_ids"]) if self._made is None else self._made.of_row(row)

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """The same random rows of the calibration data in each process, by length, on the model's device."""
        settings = self.student.settings
        data: Any = self.calibration_dataset
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen: list[dict[str, Any]] = []
        tokens = 0
        for i in torch.randperm(len(data), generator=generator)[: settings.calibration_rows].tolist():
            row = self._needed(data[i])
            tokens += self._tokens_in(row)
            if chosen and tokens > settings.calibration_tokens:
                break
            chosen.append(row)
        chosen.sort(key=self._tokens_in)
        size = self.args.per_device_eval_batch_size
        device = next(self.student.model.parameters()).device
        batches = [self.data_collator(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        return [{k: v.to(device) for k, v in b.items()} for b in batches]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's. Its grouping by length draws from the global generator, which differs after resuming."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self.order
        return sampler

    # -- the Trainer's own steps ---------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the phase in training; in evaluation that on labels, or the divergence from the teacher."""
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the Trainer's; rows without labels have a loss, too: the divergence from the teacher."""
        if self.student.head.has_labels(inputs) or not self.student.head.label_keys:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**self._prepare_inputs(inputs))
        loss = outputs.pop("loss").detach()
        values = tuple(outputs.values())
        return loss, None if prediction_loss_only else values[0] if len(values) == 1 else values, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups with learning rates of their own: the model with and without weight decay, predictors, gates."""
        if self.optimizer is None:
            self.optimizer = self._new_optimizer(model if model is not None else self.student)
        return self.optimizer

    def _new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings, args = self.student.settings, self.args
        decayed = set(self.get_decay_parameter_names(model))
        rates = {"predictors": settings.predictor_learning_rate, "gates": settings.gate_learning_rate}
        rates["constraint"] = settings.gate_learning_rate
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            name = name.removeprefix("module.")
            part = name.split(".")[0]
            groups.setdefault((part, part == "model" and name in decayed), []).append(parameter)
        optimizer_class, options = self.optimizer_cls_and_kwargs or optimizer_of(args)
        made = [
            {
                "params": parameters,
                "lr": rates.get(part, args.learning_rate),
                "weight_decay": args.weight_decay if decays else 0.0,
                "name": part,
            }
            for (part, decays), parameters in groups.items()
        ]
        optimizer: torch.optim.Optimizer = optimizer_class(made, **options)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule asked for, from where the model begins to learn; that of predictors falls from the first step,
        and gates learn at a constant rate."""
        if self.lr_scheduler is None:
            used: Any = optimizer or self.optimizer
            begin = self.conductor.model_begins(num_training_steps)
            follows = schedule(self.args, num_training_steps - begin, self.args.get_warmup_steps(num_training_steps))

            def model(step: int) -> float:
                return follows(step - begin) if step >= begin else 0.0

            def predictors(step: int) -> float:
                return max(0.0, (num_training_steps - step) / max(1, num_training_steps))

            rates = {"model": model, "predictors": predictors}
            self.lr_scheduler = LambdaLR(used, [rates.get(g["name"], lambda _: 1.0) for g in used.param_groups])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's figures, with the phase's losses, rank correlations and cost."""
        if "loss" in logs:
            logs.update({k: round(v, 4) for k, v in self.student.step.logged.items()})
        super().log(logs, *args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        from safetensors import SafetensorError

        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as e:
            if isinstance(e, RuntimeError) and "writ" not in str(e):  # torch's own where a disk is full
                raise
            reason = str(e).splitlines()[0]
            raise ExportError(
                f"The checkpoint after step {self.state.global_step} could not be written to {self.args.output_dir}: "
                f"{reason}. Whole earlier ones stay: make room, and resume from the last of them."
            ) from e

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        save_student(self.student, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Take up a checkpoint without training on.

        Raises:
            PlanError, WeightsError: see `load_student`.
        """
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _ = self.student.forms.graphs  # the teacher is the model as it was given, so it is made before that changes
        load_student(self.student, Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Only states with a plan compete: eval_on_start scores the dense model. One that wins is saved, also between
        two steps that checkpoints are due at, as an older one would be taken for the best."""
        is_best = bool(self.student.plans) and super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _load_best_model(self) -> None:
        self.load_best()

    def load_best(self) -> None:
        """Take up the best checkpoint, where evaluations chose one.

        Raises:
            PlanError, WeightsError: see `load_student`.
        """
        if self.state.best_model_checkpoint is None:
            return
        best = Path(self.state.best_model_checkpoint)
        moved = Path(str(self.args.output_dir)) / best.name  # along with the others, since it was written
        load_student(self.student, moved if moved.is_dir() else best)


def _tokens_of(model: nn.Module, head: Head, row: Mapping[str, Any]) -> Tokens:
    (name,) = head.inputs
    if name not in row:
        what = "sound" if head.reads_sound else "images"
        raise DataError(f"The model reads {what}: each row needs {name}, and the first has {', '.join(row)}.")
    return tokens_of(model, name, torch.as_tensor(row[name]))


def _lengths(rows: Any, made: Tokens | None) -> list[int]:
    """Live tokens of the rows; of some thousands spread over the data, where there are more."""
    if made is not None and made.fixed is not None:
        return [made.fixed] * min(len(rows), 4096)
    step = 1 + len(rows) // 4096
    if isinstance(rows, Sounds):  # known without reading each file
        return rows.lengths[::step]
    chosen = (rows[i] for i in range(0, len(rows), step))
    if made is not None:
        return [made.of_row(row) for row in chosen]
    return [int(sum(row["attention_mask"])) if "attention_mask" in row else len(row["input_ids"]) for row in chosen]


def _longest(rows: Any) -> int:
    return max(len(rows[i]["input_ids"]) for i in range(len(rows)))


def _budgets(prune: PruneConfig, costs: PlanCosts) -> list[float]:
    """Shares of the dense cost: the goal's, then the extra ones."""
    if prune.goal.share is not None:
        return [prune.goal.share, *prune.extra_budgets]
    assert prune.goal.latency_ms is not None
    share = prune.goal.latency_ms / 1e3 / costs.dense
    if share >= 1:
        raise OptionError(
            f"The dense model takes {costs.dense * 1e3:.2f} ms a text already, less than the "
            f"{prune.goal.latency_ms:g} ms asked for: there is nothing to prune."
        )
    return [share]


def _check_goal(prune: PruneConfig, costs: CostModel | None) -> None:
    if prune.goal.target != FLOPS and costs is None:
        raise OptionError(
            f"The goal is time on {prune.goal.target}: pass costs=LatencyTable.measure(model, example, "
            f'target="{prune.goal.target}") (prunepass.cost.latency), which measures it.'
        )


def _check_budget(budget: float, student: Student, prices: PlanCosts) -> None:
    """A budget that cannot be met is told before anything is trained."""
    cheapest = [Stage(student.cuts[0], Fraction(1, 1000))]
    if student.settings.plan is None and prices.share(cheapest) > budget:
        raise shortfall(budget, prices, cheapest)


def _check_processes(args: TrainingArguments) -> None:
    if world_size() != args.world_size:
        raise OptionError(
            f"{world_size()} processes were started, but each would train alone, as if there were no others. "
            "Start one process, or with torchrun one for each GPU; on the CPU give TrainingArguments use_cpu=True."
        )


def _check_rows(rows: Any, name: str) -> None:
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise DataError(f"PruneTrainer needs a {name} with a length and rows by number.")
    if len(rows) == 0:
        raise DataError(f"The {name} is empty.")
