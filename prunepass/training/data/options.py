"""What can be asked of training and of search: frozen dataclasses, checked on the spot. Data only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from prunepass.errors import OptionError

__all__ = ["FLOPS", "METHODS", "Goal", "SearchOptions", "Source", "TrainOptions"]

#: the target whose unit is the floating-point operation; all others are runtimes, measured in seconds
FLOPS = "flops"

#: what `TrainOptions.method` may be, and what each ranks tokens by
METHODS = {
    "both": "ToP's search for layers and ratios over SDTP's small predictors, which learn a ranking of tokens",
    "top": "ToP: attention received, distilled from the unpruned model's last layer",
    "sdtp": "SDTP: small predictors that learn gradient saliency, on a geometric schedule",
}


@dataclass(frozen=True)
class Goal:
    """What the pruned model may cost. Exactly one of ``share`` and ``latency_ms`` is given.

    Args:
        share: share of the dense model's cost, in (0, 1), over real lengths.
        latency_ms: milliseconds a text on ``target``, above 0.
        target: ``"flops"``, or the runtime that cost is measured on (``"openvino"``, ...). With ``share`` and a
            runtime, the share is one of measured time.

    Raises:
        OptionError: none or both are given, one is out of range, or milliseconds are asked for without a runtime.
    """

    share: float | None = None
    latency_ms: float | None = None
    target: str = FLOPS

    def __post_init__(self) -> None:
        if (self.share is None) == (self.latency_ms is None):
            raise OptionError("Give either a budget (0.4: two fifths of the dense cost) or a latency in milliseconds.")
        if self.share is not None and not 0 < self.share < 1:
            raise OptionError(
                f"The budget is the share of the dense model's cost that may remain, between 0 and 1; {self.share} "
                "is not. Two fifths is 0.4."
            )
        if self.latency_ms is not None:
            _positive("The latency in milliseconds", self.latency_ms)
            if self.target == FLOPS:
                raise OptionError("A latency needs a runtime to be measured on: name one as target, such as openvino.")


@dataclass(frozen=True)
class Source:
    """Where examples come from, and what their columns are called.

    Args:
        name: a .csv, .tsv, .jsonl, .ndjson or .json file, a folder of the ``datasets`` package, or a data set's name
            on the hub, with its configuration behind a colon where it has several (``"nyu-mll/glue:sst2"``).
        text: column of the (first) text, or of the list of words; guessed from usual names where left out.
        pair: column of the second text.
        label: column of the labels.
        split: of a data set by name (``"train"``, the default, ``"validation"``, ...); files have none.
        quoting: whether quotes in .csv and .tsv files enclose a field. None: they do in .csv, and do not in .tsv,
            where they are usually part of the text.
        encoding: of a file.
    """

    name: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    split: str | None = None
    quoting: bool | None = None
    encoding: str = "utf-8-sig"  # UTF-8, with or without a byte-order mark

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("The name of the data is empty: give a file, a folder or the name of a data set.")
        named = [column for column in (self.text, self.pair, self.label) if column is not None]
        if len(set(named)) < len(named):
            raise OptionError(f"--text, --pair and --label must be different columns, not {', '.join(named)}.")


@dataclass(frozen=True)
class TrainOptions:
    """Everything that `prunepass train` takes.

    Args:
        model: folder, or name on the hub, of the model to prune.
        data: training examples. Labels are optional: the unpruned model teaches.
        out: folder to write: the plan, and the model where it was trained along.
        goal: what the pruned model may cost.
        eval_data: examples to report on; a tenth of ``data`` is held out where left out.
        method: a key of `METHODS`.
        teacher: folder or name of the model to learn from; ``model`` itself where left out.
        scorer: with ``method="top"``, what ranks tokens: ``"attention"`` (default) or another scorer without
            weights. The other methods train ``"mlp"``.
        epochs: passes over the data; fractions are allowed.
        learning_rate: of the model's own weights.
        predictor_learning_rate: of predictors and gates.
        predictor_positions: let predictors look at a token's place in its row, too; see `PruneConfig`.
        batch_size: texts a step.
        max_length: tokens a text is cut to; what the model takes, and at most 512, where left out.
        freeze_model: train predictors and gates only.
        seed: of the order of examples, initial weights and sampling.
        bf16: compute in bfloat16 (automatic mixed precision).
        calibration_rows: rows that layers and shares are searched on, at most.
        save_steps: steps between checkpoints; one an epoch where left out. One lies before and behind a search, too.
        resume: go on from the last checkpoint in `prunepass.training.loop.output.checkpoints_of`\\ (out).
        logging: where the Trainer logs to, as its ``report_to``: ``"none"``, ``"tensorboard"``, ``"wandb"``, ...
        protect_token_ids: ids kept wherever they stand.
        overwrite: replace ``out`` where it exists.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: str
    data: Source
    out: Path
    goal: Goal
    eval_data: Source | None = None
    method: str = "both"
    teacher: str | None = None
    scorer: str | None = None
    epochs: float = 2.0
    learning_rate: float = 5e-5
    predictor_learning_rate: float = 2e-3
    predictor_positions: bool = False
    batch_size: int = 32
    max_length: int | None = None
    freeze_model: bool = False
    seed: int = 0
    bf16: bool = False
    calibration_rows: int = 768
    save_steps: int | None = None
    resume: bool = False
    logging: str = "none"
    protect_token_ids: tuple[int, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        _check_scorer(self.method, self.scorer)
        if self.freeze_model and self.method == "top":
            raise OptionError(
                "ToP ranks by the model's own attention, so with a frozen model nothing could be learned."
            )
        _positive("--epochs", self.epochs)
        _positive("--lr", self.learning_rate)
        _positive("--predictor-lr", self.predictor_learning_rate)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--calibration-rows", self.calibration_rows, 1)
        if self.save_steps is not None:
            _at_least("--save-steps", self.save_steps, 1)
        _check_common(self.max_length, self.seed, self.protect_token_ids)

    @property
    def ranks_by(self) -> str:
        """The scorer of the plan that training ends with."""
        return self.scorer or ("attention" if self.method == "top" else "mlp")


@dataclass(frozen=True)
class SearchOptions:
    """Everything that `prunepass search` takes.

    Args:
        model: folder, or name on the hub, of the model to prune.
        data: calibration examples; labels are not needed.
        out: folder to write the plan to.
        goal: what the pruned model may cost.
        scorer: what ranks tokens. ``"mlp"`` takes its predictors from ``plan``.
        plan: folder of a trained plan, whose predictors are used.
        rows: how many examples to calibrate on.
        max_evaluations: how many plans to try on them at most.
        batch_size: texts a step.
        max_length: tokens a text is cut to; what the model takes, and at most 512, where left out.
        seed: of the choice of examples.
        protect_token_ids: ids kept wherever they stand.
        overwrite: replace ``out`` where it exists.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: str
    data: Source
    out: Path
    goal: Goal
    scorer: str | None = None
    plan: Path | None = None
    rows: int = 256
    max_evaluations: int = 80
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0
    protect_token_ids: tuple[int, ...] = ()
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.scorer is not None:
            _check_scorer_name(self.scorer)
        if self.ranks_by == "mlp" and self.plan is None:
            raise OptionError(
                "--scorer mlp needs trained predictors: give --plan, the folder that prunepass train has written, "
                "or choose a scorer without weights, such as norm or attention."
            )
        if self.ranks_by != "mlp" and self.plan is not None:
            raise OptionError(
                f"--scorer {self.scorer} has no use for the predictors of --plan {self.plan}; leave out one."
            )
        _at_least("--rows", self.rows, 1)
        _at_least("--max-evaluations", self.max_evaluations, 1)
        _at_least("--batch-size", self.batch_size, 1)
        _check_common(self.max_length, self.seed, self.protect_token_ids)

    @property
    def ranks_by(self) -> str:
        """The scorer of the plan that search ends with: the one asked for, else as predictors are at hand or not."""
        return self.scorer or ("attention" if self.plan is None else "mlp")


def _check_scorer(method: str, scorer: str | None) -> None:
    if scorer is None:
        return
    _check_scorer_name(scorer)
    if method == "top" and scorer == "mlp":
        raise OptionError("ToP ranks by attention. For its search with the mlp scorer ask for --method both.")
    if method != "top" and scorer != "mlp":
        raise OptionError(f"--method {method} trains the mlp scorer, not {scorer}; leave --scorer out.")


def _check_scorer_name(scorer: str) -> None:
    from prunepass.scorers import names

    _one_of("scorer", scorer, tuple(names()))


def _check_common(max_length: int | None, seed: int, token_ids: tuple[int, ...]) -> None:
    if max_length is not None:
        _at_least("--max-length", max_length, 2)
    _at_least("--seed", seed, 0)
    for token_id in token_ids:
        _at_least("A token's id in --protect-token-ids", token_id, 0)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"There is no {what} {value!r}; choose one of {', '.join(known)}.")


def _positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{what} must be a number above 0, not {value}.")


def _at_least(what: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{what} must be a whole number of at least {least}, not {value}.")
