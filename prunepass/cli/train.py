"""The commands ``prunepass train`` and ``prunepass search``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Annotated

from prunepass.backends import get_target, target_names
from prunepass.backends._options import unknown
from prunepass.cli.common import err, print_json, working
from prunepass.cli.flags import taking_flags
from prunepass.cli.options import Json
from prunepass.cli.outcome import print_outcome
from prunepass.cli.progress import Bars
from prunepass.cli.stopping import again, how_to_go_on, interruptible, say_stopping
from prunepass.errors import ExportError, MissingExtraError, OptionError
from prunepass.training.data.declare import Declared
from prunepass.training.data.options import FLOPS, Goal, SearchOptions, Source, TrainOptions
from prunepass.training.loop.outcome import Outcome
from prunepass.training.loop.output import checkpoints_of, clear_checkpoints, new_folder
from prunepass.training.loop.processes import from_main, is_main, leave, world_size

__all__ = ["search", "train"]


@dataclass(frozen=True)
class HeldOut:
    """Data to report on, and to choose a checkpoint by."""

    eval_data: Annotated[
        str | None, Declared("Data to report on. Default: a tenth of DATA, held out.", flags=("--eval",))
    ] = None
    eval_split: Annotated[str | None, Declared("Split to report on, of --eval or of DATA.")] = None

    validation: Annotated[
        str | None,
        Declared(
            "Data to choose the best checkpoint by, the model before it adapts among them. Not what MODEL was "
            "fine-tuned on: it knows those answers by heart, and each change looks like a loss there. Default: the "
            "last checkpoint is taken."
        ),
    ] = None
    validation_split: Annotated[str | None, Declared("Split to choose by, of --validation or of DATA.")] = None

    def told(self, options: TrainOptions) -> TrainOptions:
        """``options`` with what is said here, in columns of their data."""
        data = options.data
        return replace(
            options,
            eval_data=_other(data, self.eval_data, self.eval_split),
            validation=_other(data, self.validation, self.validation_split),
        )


def _other(data: Source, name: str | None, split: str | None) -> Source | None:
    return None if name is None and split is None else replace(data, name=name or data.name, split=split)


@taking_flags()
def train(options: TrainOptions, held_out: HeldOut, as_json: Json = False) -> None:
    """Train what to prune: predictors, layers and shares, and the model along with them. Labels are not needed."""
    options = held_out.told(options)
    _check(options.goal)
    with interruptible(lambda: how_to_go_on(options.out)):
        outcome = _train(options)
        _finish(outcome, options, as_json)


@taking_flags(leave_out=("label",))
def search(options: SearchOptions, as_json: Json = False) -> None:
    """Find layers and shares for a budget without any training: the least loss on calibration data."""
    _check(options.goal)
    with interruptible(lambda: f"Nothing was written. Start anew with {again()}"):
        outcome = _search(options)
        _finish(outcome, options, as_json)


def _check(goal: Goal) -> None:
    """Raises where the target is not known, or what it needs, or training, is not installed."""
    known = [FLOPS, *target_names()]
    if goal.target not in known:
        raise OptionError(unknown(goal.target, "target", known))
    if goal.target != FLOPS:
        get_target(goal.target)
    _check_extra()


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
            return recipe.train(options, ready, bars, Stop(say_stopping))
    except ExportError as e:  # a checkpoint could not be written
        raise ExportError(f"{e} {how_to_go_on(options.out)}") from None


def _search(options: SearchOptions) -> Outcome:
    from prunepass.training.loop import recipe
    from prunepass.training.loop.prepare import prepare_search

    if world_size() > 1:
        raise OptionError("A search runs in one process; start it without torchrun.")
    with working("loading the model and reading the data"):
        ready = prepare_search(options)
    with Bars(err) as bars:
        return recipe.search(options, ready, bars)


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
    err.print(f"Next: {_nextagain(outcome, options)}", highlight=False, markup=False, soft_wrap=True)


#: example inputs of models that read no texts, by the name of what they read
_SOUND = "dict(feature_extractor([sound, sound], ...))"
_INPUTS = {"pixel_values": "{'pixel_values': images}", "input_values": _SOUND, "input_features": _SOUND}


def _nextagain(outcome: Outcome, options: TrainOptions | SearchOptions) -> str:
    """What writes the pruned model for a runtime. A folder that holds a model and a plan brings both."""
    exported = f"{options.out.parent / options.out.name}-openvino"
    inputs = _INPUTS.get(getattr(outcome.model, "main_input_name", ""))
    if inputs is not None:  # the command makes inputs of texts
        return (
            f"load the model from {options.out} in Python, then "
            f"prunepass.export(model, None, {exported!r}, example_inputs={inputs})"
        )
    if outcome.model is not None:
        return shlex.join(["prunepass", "export", str(options.out), exported, "--to", "openvino"])
    plan = ["--plan", str(options.out)]
    return shlex.join(["prunepass", "export", options.model, exported, *plan, "--to", "openvino"])


def _kept(options: TrainOptions | SearchOptions) -> str:
    """What a run whose folder could not be written leaves."""
    if isinstance(options, SearchOptions):
        return f"Make room, or choose another --out: {again()}"
    return f"What was learned is kept in {checkpoints_of(options.out)}. Make room, then go on with {again('--resume')}"
