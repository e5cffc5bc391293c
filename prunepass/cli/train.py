"""The commands ``prunepass train`` and ``prunepass search``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from prunepass.backends import get_target, target_names
from prunepass.backends._options import unknown
from prunepass.cli.common import clear_errors, err, print_json, working
from prunepass.cli.outcome import print_outcome
from prunepass.cli.progress import Bars
from prunepass.errors import ExportError, MissingExtraError, OptionError
from prunepass.training.data.options import FLOPS, Goal, SearchOptions, Source, TrainOptions
from prunepass.training.loop.outcome import Outcome
from prunepass.training.loop.output import checkpoints_of, clear_checkpoints, last_checkpoint, new_folder, step_of
from prunepass.training.loop.processes import from_main, is_main, leave, world_size

__all__ = ["search", "train"]

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model, or its name on the hub.")
]
DataArg = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="A .csv, .tsv, .jsonl or .json file, or a data set by name (owner/name:configuration)."
    ),
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It must not exist or be empty.")]
BudgetOpt = Annotated[float | None, typer.Option(help="Share of the dense model's cost that may remain, such as 0.4.")]
LatencyOpt = Annotated[float | None, typer.Option(help="Instead of --budget: milliseconds a text, on --target.")]
TargetOpt = Annotated[str, typer.Option(help="What cost is: flops, or time measured on inductor, openvino, ...")]
TextOpt = Annotated[str | None, typer.Option(help="Column of the text, or of its words. Default: by usual names.")]
PairOpt = Annotated[str | None, typer.Option(help="Column of the second text.")]
LabelOpt = Annotated[str | None, typer.Option(help="Column of the labels.")]
SplitOpt = Annotated[str | None, typer.Option(help="Split of a data set by name. Default: train.")]
EncodingOpt = Annotated[str, typer.Option(help="Encoding of data files.")]
QuotingOpt = Annotated[
    bool | None,
    typer.Option("--quoting/--no-quoting", help="Whether quotes enclose fields. Default: in .csv, not in .tsv."),
]
BatchOpt = Annotated[int, typer.Option(help="Texts a step, in each process.")]
LengthOpt = Annotated[int | None, typer.Option(help="Cut texts to this many tokens. Default: at most 512.")]
SeedOpt = Annotated[int, typer.Option(help="Of the order of examples, initial weights and sampling.")]
ProtectOpt = Annotated[str | None, typer.Option(help="Ids of tokens that are always kept, such as 102,103.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, to stdout.")]


def train(
    model: ModelArg,
    data: DataArg,
    folder: OutOpt,
    budget: BudgetOpt = None,
    latency_ms: LatencyOpt = None,
    target: TargetOpt = FLOPS,
    method: Annotated[
        str,
        typer.Option(help="both: search for layers and shares, with small predictors (default); top; sdtp."),
    ] = "both",
    teacher: Annotated[str | None, typer.Option(help="Model to learn from. Default: MODEL, unpruned.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="With --method top: what ranks tokens. Default: attention.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval", help="Data to report on. Default: a tenth of DATA, held out.")
    ] = None,
    text: TextOpt = None,
    pair: PairOpt = None,
    label: LabelOpt = None,
    split: SplitOpt = None,
    eval_split: Annotated[str | None, typer.Option(help="Split to report on, of --eval or of DATA.")] = None,
    encoding: EncodingOpt = "utf-8-sig",
    quoting: QuotingOpt = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Learning rate of the model.")] = 5e-5,
    predictor_lr: Annotated[float, typer.Option(help="Learning rate of the predictors.")] = 2e-3,
    predictor_positions: Annotated[
        bool, typer.Option("--predictor-positions", help="Let predictors look at places, too: for rotary positions.")
    ] = False,
    batch_size: BatchOpt = 32,
    max_length: LengthOpt = None,
    freeze_model: Annotated[
        bool, typer.Option("--freeze-model/--train-model", help="Train predictors only, or the model along with them.")
    ] = False,
    seed: SeedOpt = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    calibration_rows: Annotated[
        int, typer.Option(help="Rows that layers and shares are searched on, at most. More take longer.")
    ] = 768,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: one an epoch, and around the search.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.checkpoints.")
    ] = False,
    logging: Annotated[str, typer.Option(help="Where the Trainer logs to: none, tensorboard, wandb, ...")] = "none",
    protect_token_ids: ProtectOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train what to prune: predictors, layers and shares, and the model along with them. Labels are not needed."""
    with clear_errors():
        source = Source(data, text, pair, label, split, quoting, encoding)
        options = TrainOptions(
            model=model,
            data=source,
            out=folder,
            goal=_goal(budget, latency_ms, target),
            eval_data=_eval_source(source, eval_data, eval_split),
            method=method,
            teacher=teacher,
            scorer=scorer,
            epochs=epochs,
            learning_rate=lr,
            predictor_learning_rate=predictor_lr,
            predictor_positions=predictor_positions,
            batch_size=batch_size,
            max_length=max_length,
            freeze_model=freeze_model,
            seed=seed,
            bf16=bf16,
            calibration_rows=calibration_rows,
            save_steps=save_steps,
            resume=resume,
            logging=logging,
            protect_token_ids=_token_ids(protect_token_ids),
            overwrite=overwrite,
        )
        _check_extra()
        with _interruptible(lambda: _how_to_go_on(folder)):
            outcome = _train(options)
            _finish(outcome, options, as_json)


def search(
    model: ModelArg,
    data: DataArg,
    folder: OutOpt,
    budget: BudgetOpt = None,
    latency_ms: LatencyOpt = None,
    target: TargetOpt = FLOPS,
    plan: Annotated[Path | None, typer.Option(help="Folder of a trained plan, whose predictors are used.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="What ranks tokens: norm, attention, or mlp, which takes --plan.")
    ] = None,
    text: TextOpt = None,
    pair: PairOpt = None,
    split: SplitOpt = None,
    encoding: EncodingOpt = "utf-8-sig",
    quoting: QuotingOpt = None,
    rows: Annotated[int, typer.Option(help="How many examples to try plans on.")] = 256,
    max_evaluations: Annotated[int, typer.Option(help="How many plans to try at most.")] = 80,
    batch_size: BatchOpt = 32,
    max_length: LengthOpt = None,
    seed: SeedOpt = 0,
    protect_token_ids: ProtectOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find layers and shares for a budget without any training: the least loss on calibration data."""
    with clear_errors():
        options = SearchOptions(
            model=model,
            data=Source(data, text, pair, None, split, quoting, encoding),
            out=folder,
            goal=_goal(budget, latency_ms, target),
            scorer=scorer,
            plan=plan,
            rows=rows,
            max_evaluations=max_evaluations,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            protect_token_ids=_token_ids(protect_token_ids),
            overwrite=overwrite,
        )
        _check_extra()
        with _interruptible(lambda: f"Nothing was written. Start anew with {_command()}"):
            outcome = _search(options)
            _finish(outcome, options, as_json)


def _train(options: TrainOptions) -> Outcome:
    from prunepass.training.loop import recipe
    from prunepass.training.loop.prepare import prepare_training
    from prunepass.training.loop.progress import Stop

    with working("loading the model and reading the data", hidden=not is_main()):
        ready = prepare_training(options)
    if not options.resume and is_main():
        clear_checkpoints(options.out)  # there are some only where they may be overwritten
    try:
        with Bars(err, hidden=not is_main()) as bars:
            return recipe.train(options, ready, bars, Stop(_say_stopping))
    except ExportError as e:  # a checkpoint could not be written
        raise ExportError(f"{e} {_how_to_go_on(options.out)}") from None


def _search(options: SearchOptions) -> Outcome:
    from prunepass.training.loop import recipe
    from prunepass.training.loop.prepare import prepare_search

    if world_size() > 1:
        raise OptionError("A search runs in one process; start it without torchrun.")
    with working("loading the model and reading the data"):
        ready = prepare_search(options)
    with Bars(err) as bars:
        return recipe.search(options, ready, bars)


# -- stopping --------------------------------------------------------------------------------------------------------


def _say_stopping() -> None:
    err.print("Stopping after this step. Press Ctrl-C again to stop at once.", highlight=False)


@contextmanager
def _interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends with one line on stderr and exit code 130, as shells have it."""
    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            err.print(f"Stopped. {escape(how_to_go_on())}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _how_to_go_on(folder: Path) -> str:
    try:
        step = step_of(last_checkpoint(folder))
    except OptionError:
        return f"There is no checkpoint yet. Start anew with {_command()}"
    return f"Step {step} was saved. Go on with {_command('--resume')}"


def _command(*more: str) -> str:
    """The command that runs, with more options."""
    if Path(sys.argv[0]).stem not in ("prunepass", "__main__"):
        return " ".join(["the same command", *(f"and {option}" for option in more)])
    return shlex.join(["prunepass", *(a for a in sys.argv[1:] if a not in more), *more])


# -- from options to objects -----------------------------------------------------------------------------------------


def _goal(budget: float | None, latency_ms: float | None, target: str) -> Goal:
    known = [FLOPS, *target_names()]
    if target not in known:
        raise OptionError(unknown(target, "target", known))
    if target != FLOPS:
        get_target(target)
    return Goal(budget, latency_ms, target)


def _eval_source(data: Source, name: str | None, split: str | None) -> Source | None:
    if name is None and split is None:
        return None
    return replace(data, name=name or data.name, split=split)


def _token_ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise OptionError(f"--protect-token-ids takes whole numbers such as 102,103, not {text!r}.") from None


def _check_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("accelerate", "safetensors") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(", ".join(missing), "train", "Training")


# -- output ----------------------------------------------------------------------------------------------------------


def _finish(outcome: Outcome, options: TrainOptions | SearchOptions, as_json: bool) -> None:
    from safetensors import SafetensorError

    def save() -> None:
        try:
            with new_folder(options.out, overwrite=options.overwrite) as folder:
                outcome.save_pretrained(folder)
        except (OSError, SafetensorError, ExportError) as e:
            raise ExportError(f"{options.out} could not be written: {e}. {_kept(options)}") from None
        if isinstance(options, TrainOptions):
            clear_checkpoints(options.out)

    from_main(save)
    leave()
    if not is_main():
        return
    if as_json:
        print_json(outcome.to_dict())
        return
    print_outcome(outcome, "FLOPs" if options.goal.target == FLOPS else f"time on {options.goal.target}")
    err.print(f"Written to {options.out}", highlight=False, soft_wrap=True)
    err.print(f"Next: {_next_command(outcome, options)}", highlight=False, markup=False, soft_wrap=True)


def _next_command(outcome: Outcome, options: TrainOptions | SearchOptions) -> str:
    """What writes the pruned model for a runtime. A folder that holds a model and a plan brings both."""
    exported = f"{options.out.parent / options.out.name}-openvino"
    if outcome.model is not None:
        return shlex.join(["prunepass", "export", str(options.out), exported, "--to", "openvino"])
    plan = ["--plan", str(options.out)]
    return shlex.join(["prunepass", "export", options.model, exported, *plan, "--to", "openvino"])


def _kept(options: TrainOptions | SearchOptions) -> str:
    """What a run whose folder could not be written leaves."""
    if isinstance(options, SearchOptions):
        return f"Make room, or choose another --out: {_command()}"
    return (
        f"What was learned is kept in {checkpoints_of(options.out)}. Make room, then go on with {_command('--resume')}"
    )
