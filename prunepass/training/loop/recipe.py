"""What the commands ``prunepass train`` and ``prunepass search`` do, as two functions."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prunepass.cost.blocks import BlockCosts
from prunepass.cost.latency import LatencyTable
from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.passes.segments import TYPES_NAME
from prunepass.plan import Protect, PrunePlan, ScorerSpec
from prunepass.plan.annotations import Leave, Restore, Segment
from prunepass.training.data.features import Features, build_dataset
from prunepass.training.data.heads import Head, Kind
from prunepass.training.data.options import FLOPS, NO_SEGMENT, Goal, SearchOptions, TrainOptions
from prunepass.training.data.rows import Rows
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.evaluate import WHOLE_TEXT, Compared, Evaluation, equal_length
from prunepass.training.loop.outcome import Outcome, Taken
from prunepass.training.loop.output import checkpoints_of, step_of
from prunepass.training.loop.predictors import scorers_by_layer, stage_parts, with_weights
from prunepass.training.loop.prepare import ReadyToSearch, ReadyToTrain
from prunepass.training.loop.processes import computes_on_cpu, from_main, world_size
from prunepass.training.loop.progress import Progress, Silent, Stop, Telling
from prunepass.training.loop.record import details
from prunepass.training.methods.calibrate import Calibration
from prunepass.training.methods.graphs import TrainingGraphs
from prunepass.training.methods.schedules import Budget
from prunepass.training.methods.search import search as search_stages

if TYPE_CHECKING:
    from prunepass.training.loop.trainer import PruneTrainer

__all__ = ["leaving", "restore_for", "search", "steps_of", "train"]

logger = logging.getLogger(__name__)

#: fields of `TrainOptions` that a configuration has, too, under the same names and with the same defaults
_SAME = (
    "goal", "method", "freeze_model", "predictor_learning_rate", "predictor_positions", "calibration_rows",
)  # fmt: skip
_READS_ALL = (Kind.EMBEDDING, Kind.TOKEN_CLASSIFICATION, Kind.QUESTION_ANSWERING, Kind.MASKED_LM)


def train(
    options: TrainOptions, ready: ReadyToTrain, progress: Progress | None = None, stop: Stop | None = None
) -> Outcome:
    """Train as `TrainOptions` say; nothing but checkpoints is written, and nothing printed.

    Args:
        progress: told of what is done.
        stop: asked to stop, training ends after a step, with a checkpoint.

    Raises:
        KeyboardInterrupt: it was stopped.
        CaptureError, RefusalError: the model cannot be pruned.
        OptionError: the goal cannot be met, or is met by the dense model.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    from prunepass.training.loop.trainer import PruneTrainer

    started = time.perf_counter()
    model, head = ready.loaded.model, ready.head
    config = PruneConfig(
        **{name: getattr(options, name) for name in _SAME},
        protect=_protect(options, ready),
        leave=(leave := cast("Leave", options.leave or "drop")),
        restore=restore_for(head, lens=options.method == "both", leave=leave),
        scorer=options.scorer,
        pairs=ready.sources[0].pairs,
    )
    arguments = TrainingArguments(
        output_dir=str(checkpoints_of(options.out)),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        seed=options.seed,
        bf16=options.bf16,
        report_to=options.logging,
        train_sampling_strategy="random" if head.makes_tokens else "group_by_length",
        use_cpu=computes_on_cpu(),  # processes without a GPU find each other only if told so
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=10,
        save_strategy="epoch" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        save_total_limit=1 if ready.validation is None else 2,  # of 1 the Trainer removes all but the best in the end
        warmup_steps=0.05,
        **({} if ready.validation is None else _keeps_best(options, ready)),
    )
    trainer = PruneTrainer(
        model,
        config,
        arguments,
        data_collator=ready.collator,
        train_dataset=ready.train,
        eval_dataset=ready.validation,
        processing_class=ready.loaded.tokenizer,
        teacher=ready.teacher,
        head=head,
        costs=_costs(options.goal, ready, _stage_of(options, config), leave),
    )
    if ready.validation is not None:
        trainer.student.validation = f"{len(ready.validation)} rows of {ready.sources[2].name}"
    for talkative in (ProgressCallback, PrinterCallback):  # they write to stdout, which is the caller's
        trainer.remove_callback(talkative)
    progress, stop = progress or Silent(), stop or Stop()
    trainer.conductor.progress, trainer.conductor.stop = progress, stop
    trainer.add_callback(Telling(trainer, progress, stop))
    dense = _untrained(trainer, ready)
    _learn(trainer, ready.checkpoint, steps_of(options, len(ready.train)), stop)
    plan = trainer.plan
    assert plan is not None
    prices = PlanCosts.over(trainer.costs, ready.evaluation.lengths, plan.protect)
    share = prices.share(plan.stages)
    trainer.student.eval()
    evaluation = Evaluation(
        head, ready.collator, options.batch_size, next(model.parameters()).device, trainer.accelerator.autocast
    )
    compared = Compared(
        evaluation, ready.evaluation, trainer.student.forms.teacher().module, dense,
        trainer.student.pruned(trainer.student.plans[0]).module, _cut(ready, trainer.costs, share, plan.protect),
    )  # fmt: skip
    return Outcome(
        plan=plan,
        cost_share=share,
        **from_main(compared.figures),
        seconds=time.perf_counter() - started,
        details=details(options, ready) | {"searches": trainer.student.searches},
        taken=None if ready.validation is None else _taken(trainer, len(ready.validation)),
        predictors=trainer.student.all_predictors(),
        model=None if options.freeze_model else model,
        tokenizer=None if options.freeze_model else ready.loaded.tokenizer,
    )


def _keeps_best(options: TrainOptions, ready: ReadyToTrain) -> dict[str, Any]:
    """Trainer's arguments for an evaluation at each checkpoint, and the best of them in the end."""
    headline = ready.head.headline if ready.sources[2].labelled else None
    return {
        "eval_strategy": "epoch" if options.save_steps is None else "steps",
        "eval_steps": options.save_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": headline or "loss",  # without labels: the distance from the unpruned model
        "greater_is_better": headline is not None,
    }


def _taken(trainer: PruneTrainer, rows: int) -> Taken | None:
    """None where nothing could be compared, which is told of."""
    state, figure = trainer.state, str(trainer.args.metric_for_best_model)
    found = {int(e["step"]): float(e[f"eval_{figure}"]) for e in state.log_history if f"eval_{figure}" in e}
    best = state.best_global_step
    if best not in found:
        logger.warning("The %s of the validation rows is no number, so the last state is taken.", figure)
        return None
    begins = trainer.conductor.model_begins(state.max_steps)
    unadapted = not trainer.student.settings.freeze_model and best <= begins + 1
    return Taken(best, state.global_step, figure, found, rows, unadapted)


def _untrained(trainer: PruneTrainer, ready: ReadyToTrain) -> nn.Module:
    """The model as it is before training: the teacher, or a copy where another model teaches."""
    if ready.teacher is None:
        return trainer.student.forms.teacher().module
    return copy.deepcopy(trainer.student.model).eval()


def _cut(ready: ReadyToTrain | ReadyToSearch, costs: CostModel, share: float, protect: Protect) -> Rows | None:
    """The rows to report on, cut until the dense model costs on them what the pruned one does on whole ones."""
    if isinstance(ready, ReadyToTrain):
        rows, source = ready.evaluation, ready.sources[1]
    else:
        rows, source = ready.calibration, ready.source
    if ready.head.kind not in WHOLE_TEXT or ready.head.makes_tokens:
        return None
    length = equal_length(costs, rows.lengths, share, protect)
    if length is None:
        return None
    return build_dataset(source, ready.loaded.tokenizer, ready.head, max_length=length, warns=False)


def _learn(trainer: PruneTrainer, checkpoint: Path | None, steps: int, stop: Stop) -> None:
    """All steps, or those that a checkpoint leaves."""
    if checkpoint is not None and step_of(checkpoint) >= steps:  # the Trainer would do one more
        trainer.load_checkpoint(checkpoint)
        trainer.conductor.settle()
        if trainer.args.load_best_model_at_end:
            trainer.load_best()
        return
    with stop.watching(), stop.waiting(True):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.asked:
        raise KeyboardInterrupt


def steps_of(options: TrainOptions, rows: int) -> int:
    """How many steps `train` takes over so many rows, with the processes that were launched."""
    return math.ceil(math.ceil(rows / (options.batch_size * world_size())) * options.epochs)


def search(options: SearchOptions, ready: ReadyToSearch, progress: Progress | None = None) -> Outcome:
    """Find stages for the goal without training; nothing is written.

    Args:
        progress: told of each plan that is tried.

    Raises:
        CaptureError, RefusalError: the model cannot be pruned.
        OptionError: the goal cannot be met.
    """
    started = time.perf_counter()
    model, head, rows = ready.loaded.model, ready.head, ready.calibration
    batches = _batches(rows, ready.collator, options.batch_size)
    graphs = TrainingGraphs(model, head.model_inputs(batches[0]))
    calibration = Calibration(head, batches, model, pairs=ready.source.pairs)
    leave = leaving(options.leave, head, ready.plan)
    template = _template(options, ready, leave)
    if ready.plan is None:
        protect = graphs.protecting(template.protect, reads_one=head.answers_once)
        template = replace(template, protect=protect)
    scorers = scorers_by_layer(template, ready.plan, graphs, head, batches)
    stage = stage_parts(options.ranks_by, scorers)
    costs = _costs(options.goal, ready, stage, leave) or BlockCosts.of(graphs.captured, **stage)

    def evaluate(plan: PrunePlan) -> float:
        if not plan.stages:
            return 0.0
        return calibration.loss(graphs.pruned(plan, {i: scorers[s.layer] for i, s in enumerate(plan.stages)}))

    progress = progress or Silent()
    progress.begin("searching", options.max_evaluations)
    found = search_stages(
        evaluate,
        costs,
        _budget(options.goal),
        lengths=rows.lengths,
        template=template,
        layers=None if ready.plan is None else sorted(scorers),
        max_evaluations=options.max_evaluations,
        on_step=lambda what: progress.step(f"searching: {what}"),
        leave=leave,
        from_embeddings=calibration.from_embeddings,
    )
    progress.end()
    plan = with_weights(found.plan, {i: scorers[stage.layer] for i, stage in enumerate(found.plan.stages)})
    device = next(model.parameters()).device
    evaluation = Evaluation(
        head, ready.collator, options.batch_size, device, nullcontext, by_labels=False, name="divergence"
    )
    pruned = graphs.pruned(found.plan, {i: scorers[s.layer] for i, s in enumerate(plan.stages)})
    cut = _cut(ready, costs, found.share, plan.protect) if plan.stages else None
    return Outcome(
        plan=plan,
        cost_share=found.share,
        **Compared(evaluation, rows, model, model, pruned, cut).figures(),
        seconds=time.perf_counter() - started,
        details=details(options, ready) | {"searches": [found.to_dict()]},
    )


def leaving(asked: str | None, head: Head, plan: PrunePlan | None = None) -> Leave:
    """How tokens leave in a search: as asked; else they merge where a mean is taken over the output, whose tokens then
    count by what they stand for.

    Args:
        plan: whose trained predictors are used. With those, dropping is as good, and costs less.
    """
    if asked is not None:
        return cast("Leave", asked)  # checked with the other options
    return "merge" if head.kind == Kind.EMBEDDING and plan is None else "drop"


def restore_for(head: Head, *, lens: bool, leave: Leave = "drop") -> Restore:
    """What pruned positions of an output carry.

    Args:
        lens: whether lenses can be had; they are taken where the head reads every token. Else zeros where a mean is
            taken over the output, and the last hidden state anywhere else.
        leave: how tokens leave. Merged ones have the state of their host, and a mean then weighs it by what it stands
            for.
    """
    if leave == "merge":
        return "last"
    if lens and head.kind in _READS_ALL:
        return "lens"
    return "zeros" if head.kind == Kind.EMBEDDING else "last"


# -- costs -----------------------------------------------------------------------------------------------------------


def _costs(goal: Goal, ready: ReadyToTrain | ReadyToSearch, stage: Mapping[str, Any], leave: Leave) -> CostModel | None:
    """Measured seconds where the goal names a runtime; None for FLOPs, which are counted on the traced graph.

    Args:
        stage: what a stage holds, as `BlockCosts.of` takes it.
        leave: how tokens leave at it.
    """
    if goal.target == FLOPS:
        return None
    rows = ready.train if isinstance(ready, ReadyToTrain) else ready.calibration
    example = ready.head.model_inputs(ready.collator([rows[i] for i in range(min(2, len(rows)))]))
    longest = max(rows.lengths)
    return from_main(  # processes that measured side by side would disturb each other, and hold different tables
        lambda: LatencyTable.measure(
            ready.loaded.model, example, target=goal.target, max_length=longest, leave=leave, **stage
        )
    )


def _stage_of(options: TrainOptions, config: PruneConfig) -> dict[str, Any]:
    hidden = config.predictor_width if options.ranks_by == "mlp" else None
    lens = config.lens_rank if config.learns_lenses else 0
    return {"scorer": options.ranks_by, "hidden": hidden, "lens": lens, "positions": config.predictor_positions}


def _budget(goal: Goal) -> Budget:
    if goal.share is not None:
        return Budget(share=goal.share)
    assert goal.latency_ms is not None
    return Budget(cost=goal.latency_ms / 1e3)


# -- plans -----------------------------------------------------------------------------------------------------------


def _protect(options: TrainOptions | SearchOptions, ready: ReadyToTrain | ReadyToSearch) -> Protect:
    """What is protected as asked for; of pairs, the short part unless something else is said."""
    if options.protect_segment is not None:
        return _asked(options)
    source, rows = (
        (ready.sources[0], ready.train) if isinstance(ready, ReadyToTrain) else (ready.source, ready.calibration)
    )
    segment = source.short_part()
    if segment is None or TYPES_NAME in ready.head.model_inputs(rows[0]):
        return Protect(token_ids=options.protect_token_ids, segment=segment)
    separator = ready.loaded.tokenizer.sep_token_id  # tells the parts apart for a model that is not told otherwise
    if separator is None:
        return _asked(options)
    return Protect(token_ids=tuple(dict.fromkeys((*options.protect_token_ids, separator))), segment=segment)


def _asked(options: TrainOptions | SearchOptions) -> Protect:
    given = options.protect_segment
    segment = cast("Segment | None", None if given == NO_SEGMENT else given)  # checked with the other options
    return Protect(token_ids=options.protect_token_ids, segment=segment)


def _template(options: SearchOptions, ready: ReadyToSearch, leave: Leave) -> PrunePlan:
    """Scorer, protected tokens and restoring of all plans tried."""
    plan = ready.plan
    if plan is None:
        return PrunePlan(
            (),
            ScorerSpec.of(options.ranks_by),
            _protect(options, ready),
            restore_for(ready.head, lens=True, leave=leave),
        )
    protect, asked = plan.protect, _asked(options)
    if asked.token_ids:
        protect = replace(protect, token_ids=tuple(dict.fromkeys((*protect.token_ids, *asked.token_ids))))
    if options.protect_segment is not None:
        protect = replace(protect, segment=asked.segment)
    return PrunePlan((), ScorerSpec("mlp"), protect, "last" if leave == "merge" else plan.restore)


# -- data --------------------------------------------------------------------------------------------------------------


def _batches(
    rows: Features, collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]], size: int
) -> list[dict[str, Tensor]]:
    """By length, so that little is computed on padding."""
    ordered = sorted(rows.rows, key=lambda row: len(row["input_ids"]))
    return [dict(collator([dict(r) for r in ordered[i : i + size]])) for i in range(0, len(ordered), size)]
