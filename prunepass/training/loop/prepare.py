"""From options to objects: model, teacher and tokenised data, all checked before anything is trained or written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunepass.errors import OptionError, option
from prunepass.export.hub import Loaded, load
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice, choose, plan_folder
from prunepass.plan.files import PLAN_FILE
from prunepass.training.data.features import Features, build_dataset, checked_length, data_collator
from prunepass.training.data.heads import Head, head_of
from prunepass.training.data.images import Images, load_images
from prunepass.training.data.media import MediaCollator, Tokens, refuse_text_options, tokens_of
from prunepass.training.data.options import EvalOptions, SearchOptions, Source, TrainOptions
from prunepass.training.data.rows import (
    Examples,
    Rows,
    check_count,
    compare_labels,
    load_examples,
    train_eval_split,
)
from prunepass.training.data.sounds import build_sounds, load_sounds
from prunepass.training.loop.arguments import check_reports
from prunepass.training.loop.checkpoint import PREDICTORS_FOLDER
from prunepass.training.loop.output import check_checkpoints, check_free, check_space, last_checkpoint

__all__ = [
    "Candidate",
    "ReadyToSearch",
    "ReadyToTrain",
    "ReadyToTry",
    "own_model",
    "prepare_search",
    "prepare_training",
    "prepare_trial",
]

logger = logging.getLogger(__name__)

_HELD_OUT = 0.1
_NO_SECONDS = "The model reads {}, and {} is for sound: leave it out."
_FEW = 32  # rows that a search looks at
_FEW_TO_CHOOSE = 100


@dataclass(frozen=True)
class ReadyToTrain:
    """What training starts from.

    Attributes:
        teacher: None where the model itself, as it is now, is the teacher.
        sources: what ``train``, ``evaluation`` and, where there is one, ``validation`` were made of, cut to ``length``
            tokens; of images and sound ``length`` is the most that the model makes.
        checkpoint: folder to go on from, if any.
        validation: rows to choose the best checkpoint by; None where the last one is taken.
    """

    loaded: Loaded
    teacher: nn.Module | None
    head: Head
    train: Rows
    evaluation: Rows
    sources: tuple[Examples, ...]
    length: int
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    checkpoint: Path | None
    validation: Rows | None = None


@dataclass(frozen=True)
class ReadyToSearch:
    """What search starts from.

    Attributes:
        plan: whose predictors are used; None where the scorer has no weights.
    """

    loaded: Loaded
    head: Head
    calibration: Features
    source: Examples
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    plan: PrunePlan | None


@dataclass(frozen=True)
class Candidate:
    """A plan to try.

    Attributes:
        name: as it was given.
        model: that it was trained with, where its folder holds one; else the plan is for the model under trial.
    """

    name: str
    choice: Choice
    model: nn.Module | None = None


@dataclass(frozen=True)
class ReadyToTry:
    """What a trial starts from.

    Attributes:
        rows: of ``source``.
    """

    loaded: Loaded
    head: Head
    rows: Features
    source: Examples
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    candidates: tuple[Candidate, ...]


def prepare_training(options: TrainOptions) -> ReadyToTrain:
    """Load and check everything `prunepass train` needs. Nothing is written.

    Raises:
        OptionError: the output is taken, there is no such model or checkpoint, the teacher is of another kind.
        DataError: see `load_examples` and `build_dataset`.
    """
    others = [source.name for source in (options.eval_data, options.validation) if source is not None]
    inputs = [options.model, options.teacher, options.data.name, *others]
    check_free(options.out, overwrite=options.overwrite, inputs=inputs)
    check_reports("logging", options.logging)
    check_checkpoints(options.out, resume=options.resume, overwrite=options.overwrite)
    checkpoint = last_checkpoint(options.out) if options.resume else None
    loaded = load(options.model, media=True)
    kept = 2 if options.validation is None else 3
    check_space(options.out, loaded.model, frozen=options.freeze_model, checkpoints=kept)
    head = head_of(loaded.model)
    if head.makes_tokens:
        return _with_media(options, loaded, head, checkpoint)
    if options.max_seconds is not None:
        raise OptionError(_NO_SECONDS.format("texts", option("max_seconds")))
    _check_token_ids(options.protect_token_ids, loaded)
    teacher = None if options.teacher is None else _alike("teacher", options.teacher, loaded, head)
    length = checked_length(options.max_length, loaded.max_length)
    sources = _sources(options, head, load_examples)
    rows = [build_dataset(source, loaded.tokenizer, head, max_length=length) for source in sources]
    collator = data_collator(head, loaded.tokenizer, max_length=length)
    train, evaluation, *validation = rows
    return ReadyToTrain(
        loaded, teacher, head, train, evaluation, sources, length, collator, checkpoint, *validation
    )  # fmt: skip


def _with_media(options: TrainOptions, loaded: Loaded, head: Head, checkpoint: Path | None) -> ReadyToTrain:
    """What training on a folder of images or sound starts from."""
    read, many = (load_sounds, "sound files") if head.reads_sound else (load_images, "images")
    refuse_text_options(options, many)
    if options.max_seconds is not None and not head.reads_sound:
        raise OptionError(_NO_SECONDS.format(many, option("max_seconds")))
    teacher = None if options.teacher is None else _alike("teacher", options.teacher, loaded, head)
    sources = _sources(options, head, read)
    (train, evaluation, *validation), tokens = _tokens_of_media(loaded, head, sources, options.max_seconds)
    return ReadyToTrain(
        loaded, teacher, head, train, evaluation, sources, train.max_length, MediaCollator(tokens), checkpoint,
        *validation,
    )  # fmt: skip


def _tokens_of_media(
    loaded: Loaded, head: Head, sources: Sequence[Examples], max_seconds: float | None
) -> tuple[Sequence[Rows], Tokens]:
    (name,) = head.inputs
    if head.reads_sound:
        return build_sounds(loaded.model, name, loaded.tokenizer, sources, max_seconds)
    first = Images(sources[0].rows[:1], loaded.tokenizer, 0)[0]
    tokens = tokens_of(loaded.model, name, first[name])
    assert tokens.fixed is not None
    return [Images(x.rows, loaded.tokenizer, tokens.fixed) for x in sources], tokens


def prepare_search(options: SearchOptions) -> ReadyToSearch:
    """Load and check everything `prunepass search` needs. Nothing is written.

    Raises:
        OptionError: the output is taken, there is no such model, or the plan has no predictors.
        DataError: see `load_examples` and `build_dataset`.
    """
    inputs = [options.model, options.data.name, options.plan]
    check_free(options.out, overwrite=options.overwrite, inputs=inputs)
    plan = None if options.plan is None else _with_predictors(options.plan)
    loaded = load(options.model)
    head = head_of(loaded.model)
    _check_token_ids(options.protect_token_ids, loaded)
    length = checked_length(options.max_length, loaded.max_length)
    examples = load_examples(options.data, head).choose(options.rows, options.seed)
    if len(examples) < _FEW:
        logger.warning("%d examples to try plans on are few: the plan found suits them by chance.", len(examples))
    calibration = build_dataset(examples, loaded.tokenizer, head, max_length=length)
    return ReadyToSearch(
        loaded, head, calibration, examples, data_collator(head, loaded.tokenizer, max_length=length), plan
    )  # fmt: skip


def prepare_trial(options: EvalOptions) -> ReadyToTry:
    """Load and check everything `prunepass eval` needs.

    Raises:
        OptionError: there is no such model, or one in a plan's folder predicts something else.
        PlanError, WeightsError: there is no such plan, or it cannot be read.
        DataError: see `load_examples` and `build_dataset`.
    """
    names = list(dict.fromkeys(options.plan or ()))
    asked = [(name, choose(name)) for name in names]
    loaded = load(options.model)
    head = head_of(loaded.model)
    candidates = [
        Candidate(_called(name), choice, _own_model(name, options.model, loaded, head)) for name, choice in asked
    ]
    if not candidates:
        folder = plan_folder(loaded.model)
        candidates = [Candidate("default plan" if folder is None else _called(folder.name), choose(None, loaded.model))]
    length = checked_length(options.max_length, loaded.max_length)
    examples = load_examples(options.data, head)
    examples = examples.choose(len(examples) if options.rows is None else options.rows, options.seed)
    rows = build_dataset(examples, loaded.tokenizer, head, max_length=length)
    collator = data_collator(head, loaded.tokenizer, max_length=length)
    return ReadyToTry(loaded, head, rows, examples, collator, tuple(candidates))


def _called(name: str) -> str:
    """As people read it: the dense model's own name is taken."""
    return f"{name} (plan)" if name == "dense" else name


def _own_model(name: str, model: str, loaded: Loaded, head: Head) -> nn.Module | None:
    """The model that lies beside a plan, unless it is ``model`` itself."""
    folder = Path(name)
    if folder.resolve() == Path(model).resolve() or not (
        (folder / PLAN_FILE).is_file() and (folder / "config.json").is_file()
    ):
        return None
    return own_model(folder, loaded, head)


def _sources(options: TrainOptions, head: Head, read: Callable[[Source, Head], Examples]) -> tuple[Examples, ...]:
    """What is trained on, reported on and, where it is asked for, chosen by."""
    examples = read(options.data, head)
    if options.eval_data is None:
        examples, held_out = train_eval_split(examples, _HELD_OUT, options.seed)
    else:
        held_out = read(options.eval_data, head)
    check_count(examples, held_out)
    compare_labels(examples, held_out, head)
    if options.validation is None:
        return examples, held_out
    if options.validation in (options.data, options.eval_data):
        what = "trained" if options.validation == options.data else "reported"
        logger.warning("The rows to choose a checkpoint by are those %s on: give others.", what)
    validation = read(options.validation, head)
    if len(validation) < _FEW_TO_CHOOSE:
        logger.warning(
            "%d rows to choose a checkpoint by are few, so chance decides: give some hundreds.", len(validation)
        )
    return examples, held_out, validation


def own_model(folder: Path, other: Loaded, head: Head) -> nn.Module:
    """The model that lies beside a plan in ``folder``, checked against ``other``."""
    return _alike("model in", str(folder), other, head)


def _alike(what: str, name: str, other: Loaded, head: Head) -> nn.Module:
    """A model that answers in the classes of ``other`` and reads its tokens. ``what`` it is, for messages."""
    found = load(name, media=head.makes_tokens)
    theirs = head_of(found.model)
    if theirs.kind != head.kind or theirs.labels != head.labels:
        raise OptionError(
            f"The {what} {name} predicts something else: {_described(theirs)}; the model: {_described(head)}."
        )
    if head.makes_tokens:
        if found.tokenizer.to_dict() != other.tokenizer.to_dict():
            files = "sound" if head.reads_sound else "images"
            raise OptionError(
                f"The {what} {name} prepares {files} in another way than the model, so it would get others."
            )
    elif found.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise OptionError(f"The {what} {name} has another vocabulary than the model, so it would read other texts.")
    return found.model


def _described(head: Head) -> str:
    return f"{head.kind} of {', '.join(head.labels)}" if head.labels else str(head.kind)


def _with_predictors(folder: Path) -> PrunePlan:
    everywhere = Path(folder) / PREDICTORS_FOLDER  # beside a trained plan: predictors of all blocks, nothing settled
    plan = PrunePlan.from_pretrained(everywhere if everywhere.is_dir() else folder)
    if not plan.weights:
        raise OptionError(f"The plan in {folder} has no trained predictors, which the scorer mlp needs.")
    return plan


def _check_token_ids(ids: tuple[int, ...], loaded: Loaded) -> None:
    most = len(loaded.tokenizer)
    for token_id in ids:
        if token_id >= most:
            raise OptionError(f"Token {token_id} cannot be protected: the tokenizer's ids end at {most - 1}.")
