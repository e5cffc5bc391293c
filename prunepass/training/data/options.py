"""What can be asked of training and of search: frozen dataclasses, checked on the spot. Data only.

Each field is declared once, here: `prunepass train` and `prunepass search` take their flags from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from prunepass.errors import OptionError, option
from prunepass.plan import ScorerSpec
from prunepass.training.data.declare import Declared, at_least, check, each_at_least, one_of, positive

__all__ = [
    "FLOPS",
    "METHODS",
    "NO_SEGMENT",
    "EvalOptions",
    "Goal",
    "SearchOptions",
    "Source",
    "TrainOptions",
    "refuse_frozen_attention",
]

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

    share: Annotated[
        float | None, Declared("Share of the dense model's cost that may remain, such as 0.4.", flags=("--budget",))
    ] = None
    latency_ms: Annotated[
        float | None, Declared("Instead of --budget: milliseconds a text, on --target.", check=positive)
    ] = None
    target: Annotated[str, Declared("What cost is: flops, or time measured on inductor, openvino, ...")] = FLOPS

    def __post_init__(self) -> None:
        if (self.share is None) == (self.latency_ms is None):
            raise OptionError("Give either a budget (0.4: two fifths of the dense cost) or a latency in milliseconds.")
        if self.share is not None and not 0 < self.share < 1:
            raise OptionError(
                f"The budget is the share of the dense model's cost that may remain, between 0 and 1; {self.share} "
                "is not. Two fifths is 0.4."
            )
        check(self)
        if self.latency_ms is not None and self.target == FLOPS:
            raise OptionError(
                f"A latency needs a runtime to be measured on: name one, such as {option('target', 'openvino')}."
            )


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        name = option("protect_token_ids")
        raise OptionError(f"{name} takes whole numbers such as 102,103, not {text!r}.") from None


@dataclass(frozen=True)
class Source:
    """Where examples come from, and what their columns are called.

    Raises:
        OptionError: there is no name, or two columns are the same.
    """

    name: Annotated[
        str,
        Declared(
            "A .csv, .tsv, .jsonl, .ndjson or .json file, a folder of the datasets package, or a data set by name "
            "(owner/name:configuration). For train with a model that reads images or sound: a folder of those files.",
            metavar="DATA",
        ),
    ]
    text: Annotated[
        str | None, Declared("Column of the (first) text, or of the list of its words. Default: by usual names.")
    ] = None
    pair: Annotated[str | None, Declared("Column of the second text.")] = None
    label: Annotated[str | None, Declared("Column of the labels.")] = None
    split: Annotated[str | None, Declared("Split of a data set by name; files have none. Default: train.")] = None
    quoting: Annotated[
        bool | None,
        Declared(
            "Whether quotes enclose fields in .csv and .tsv files. Default: in .csv; not in .tsv, where they are "
            "usually part of the text.",
            flags=("--quoting/--no-quoting",),
        ),
    ] = None
    encoding: Annotated[
        str, Declared("Encoding of data files. The default is UTF-8, with or without a byte-order mark.")
    ] = "utf-8-sig"

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("The name of the data is empty: give a file, a folder or the name of a data set.")
        named = [column for column in (self.text, self.pair, self.label) if column is not None]
        if len(set(named)) < len(named):
            columns = f"{option('text')}, {option('pair')} and {option('label')}"
            raise OptionError(f"{columns} must be different columns, not {', '.join(named)}.")


#: of a pair no part is protected
NO_SEGMENT = "none"


def _parts() -> Any:
    from prunepass.plan import parts

    return parts


# -- what several commands have in common ------------------------------------------------------------------------------

Model: TypeAlias = Annotated[str, Declared("Folder of a Hugging Face model, or its name on the hub.", metavar="MODEL")]
Out: TypeAlias = Annotated[Path, Declared("Folder to write. It must not exist or be empty.", flags=("--out", "-o"))]
BatchSize: TypeAlias = Annotated[int, Declared("Texts a step, in each process.", check=at_least(1))]
MaxLength: TypeAlias = Annotated[
    int | None,
    Declared("Cut texts to this many tokens. Default: what the model takes, and at most 512.", check=at_least(2)),
]
Seed: TypeAlias = Annotated[int, Declared("Of the order of examples, initial weights and sampling.", check=at_least(0))]
ProtectIds: TypeAlias = Annotated[
    tuple[int, ...],
    Declared(
        "Ids of tokens that are always kept, such as 102,103.",
        check=each_at_least(0),
        parse=_token_ids,
    ),
]
ProtectSegment: TypeAlias = Annotated[
    str | None,
    Declared(
        "Part of a pair that is always kept: first (the question of question and passage), second or none. Default: "
        "the part whose texts have at most a third of the characters of the other's.",
        check=one_of(lambda: (*_parts().SEGMENTS, NO_SEGMENT)),
    ),
]
Leave: TypeAlias = Annotated[
    str | None,
    Declared(
        "How tokens leave: drop, or merge into the nearest kept one. Default: drop; search merges embeddings.",
        check=one_of(lambda: _parts().LEAVES),
    ),
]
TargetConfig: TypeAlias = Annotated[
    list[str] | None, Declared("Setting of the target as KEY=VALUE; may be given more than once.")
]
RowsTaken: TypeAlias = Annotated[int | None, Declared("Take so many rows, at random. Default: all.", check=at_least(2))]
Repeats: TypeAlias = Annotated[int, Declared("Timed rounds over those texts.", check=at_least(1))]
Overwrite: TypeAlias = Annotated[bool, Declared("Replace what is in the output folder.", flags=("--overwrite",))]


def _methods() -> tuple[str, ...]:
    return tuple(METHODS)


def _scorers() -> tuple[str, ...]:
    from prunepass.scorers import names

    return tuple(names())


def _known_scorer(name: str, value: Any) -> None:
    """The name of a scorer, or a mapping with one and options, as `PruneConfig` takes it."""
    one_of(_scorers)(name, ScorerSpec.of(value).name)


@dataclass(frozen=True)
class TrainOptions:
    """Everything that `prunepass train` takes.

    Args:
        goal: what the pruned model may cost.
        eval_data: examples to report on; a tenth of ``data`` is held out where left out.
        validation: examples to choose the best checkpoint by, the model before it adapts among them; the last one is
            taken where left out. Of rows that the model was fine-tuned on it knows the answers by heart, and each
            change looks like a loss there.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: Model
    data: Source
    out: Out
    goal: Goal
    eval_data: Source | None = None
    validation: Source | None = None
    method: Annotated[
        str,
        Declared(
            "both: search for layers and shares, with small predictors (default); top; sdtp.",
            check=one_of(_methods),
        ),
    ] = "both"
    teacher: Annotated[
        str | None, Declared("Model to learn from, a folder or a name on the hub. Default: MODEL, unpruned.")
    ] = None
    scorer: Annotated[
        str | None,
        Declared(
            "With --method top: what ranks tokens, a scorer without weights. Default: attention. The other methods "
            "train mlp.",
            check=_known_scorer,
        ),
    ] = None
    epochs: Annotated[float, Declared("Passes over the data; fractions are allowed.", check=positive)] = 2.0
    learning_rate: Annotated[float, Declared("Learning rate of the model.", flags=("--lr",), check=positive)] = 5e-5
    predictor_learning_rate: Annotated[
        float, Declared("Learning rate of the predictors and gates.", flags=("--predictor-lr",), check=positive)
    ] = 2e-3
    predictor_positions: Annotated[
        bool,
        Declared(
            "Let predictors look at a token's place in its row, too: for rotary positions.",
            flags=("--predictor-positions",),
        ),
    ] = False
    batch_size: BatchSize = 32
    max_length: MaxLength = None
    freeze_model: Annotated[
        bool,
        Declared("Train predictors only, or the model along with them.", flags=("--freeze-model/--train-model",)),
    ] = False
    seed: Seed = 0
    bf16: Annotated[
        bool,
        Declared(
            "Compute in bfloat16 (automatic mixed precision): faster on GPUs, and on CPUs with AVX-512 or AMX.",
            flags=("--bf16",),
        ),
    ] = False
    calibration_rows: Annotated[
        int,
        Declared("Rows that layers and shares are searched on, at most. More take longer.", check=at_least(1)),
    ] = 768
    save_steps: Annotated[
        int | None,
        Declared("Steps between checkpoints. Default: one an epoch, and around the search.", check=at_least(1)),
    ] = None
    resume: Annotated[bool, Declared("Go on from the last checkpoint in OUT.checkpoints.", flags=("--resume",))] = False
    logging: Annotated[str, Declared("Where the Trainer logs to: none, tensorboard, wandb, ...")] = "none"
    protect_token_ids: ProtectIds = ()
    overwrite: Overwrite = False
    protect_segment: ProtectSegment = None
    leave: Leave = None
    max_seconds: Annotated[
        float | None,
        Declared(
            "Cut sound to this many seconds. Default: what a model of spectrograms takes; of waveforms the longest one "
            "in DATA, and at most 10.",
            check=positive,
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)
        _check_scorer(self.method, self.scorer)
        refuse_frozen_attention(self.method, self.freeze_model)

    @property
    def ranks_by(self) -> str:
        """The scorer of the plan that training ends with."""
        return self.scorer or ("attention" if self.method == "top" else "mlp")


@dataclass(frozen=True)
class SearchOptions:
    """Everything that `prunepass search` takes.

    Args:
        goal: what the pruned model may cost.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: Model
    data: Source
    out: Out
    goal: Goal
    scorer: Annotated[
        str | None,
        Declared("What ranks tokens: norm, attention, or mlp, which takes --plan.", check=one_of(_scorers)),
    ] = None
    plan: Annotated[Path | None, Declared("Folder of a trained plan, whose predictors are used.")] = None
    rows: Annotated[int, Declared("How many examples to try plans on.", check=at_least(1))] = 256
    max_evaluations: Annotated[int, Declared("How many plans to try at most.", check=at_least(1))] = 80
    batch_size: BatchSize = 32
    max_length: MaxLength = None
    seed: Seed = 0
    protect_token_ids: ProtectIds = ()
    overwrite: Overwrite = False
    protect_segment: ProtectSegment = None
    leave: Leave = None

    def __post_init__(self) -> None:
        check(self)
        if self.ranks_by == "mlp" and self.plan is None:
            raise OptionError(
                f"{option('scorer', 'mlp')} needs trained predictors: give {option('plan')}, the folder that prunepass "
                "train has written, or choose a scorer without weights, such as norm or attention."
            )
        if self.ranks_by != "mlp" and self.plan is not None:
            raise OptionError(
                f"{option('scorer', self.scorer)} has no use for the predictors of {option('plan', str(self.plan))}; "
                "leave out one."
            )

    @property
    def ranks_by(self) -> str:
        """The scorer of the plan that search ends with: the one asked for, else as predictors are at hand or not."""
        return self.scorer or ("attention" if self.plan is None else "mlp")


@dataclass(frozen=True)
class EvalOptions:
    """Everything that `prunepass eval` takes.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: Model
    data: Source
    plan: Annotated[
        list[str] | None,
        Declared(
            "Folder of a saved plan, or name of one that comes along; may be given more than once. A folder that "
            "holds a model, too, such as prunepass train writes, is run with its own model. Default: the plan in "
            "MODEL's folder, or else the training-free one."
        ),
    ] = None
    target: Annotated[str, Declared("What texts are timed on: inductor, openvino, onnxruntime or eager.")] = "inductor"
    config: TargetConfig = None
    deployed: Annotated[
        bool,
        Declared("Compute scores on the target, too, in its own precision; else in PyTorch.", flags=("--deployed",)),
    ] = False
    rows: RowsTaken = None
    timed: Annotated[
        int, Declared("How many texts to time, from short to long; 0 measures no time.", check=at_least(0))
    ] = 32
    repeats: Repeats = 5
    batch_size: Annotated[int, Declared("Texts in one call while scores are computed.", check=at_least(1))] = 32
    max_length: MaxLength = None
    seed: Annotated[int, Declared("Of the rows taken, and of random tokens.", check=at_least(0))] = 0
    int8: Annotated[
        bool,
        Declared(
            "With --deployed --target openvino: quantise, as prunepass export does. Ranges are measured on some of the "
            "rows.",
            flags=("--int8",),
        ),
    ] = False

    def __post_init__(self) -> None:
        check(self)
        if self.int8 and not (self.deployed and self.target == "openvino"):
            raise OptionError(
                f"{option('int8', True)} needs {option('deployed', True)} and {option('target', 'openvino')}: no other "
                "runtime computes in int8 here, so it can be scored there alone."
            )


def _check_scorer(method: str, scorer: str | None) -> None:
    if scorer is None:
        return
    if method == "top" and scorer == "mlp":
        raise OptionError(f"ToP ranks by attention. For its search with the mlp scorer: {option('method', 'both')}.")
    if method != "top" and scorer != "mlp":
        raise OptionError(
            f"{option('method', method)} trains the mlp scorer, not {scorer}; leave {option('scorer')} out."
        )


def refuse_frozen_attention(method: str, freeze_model: bool) -> None:
    """Raises `OptionError` for ToP with a frozen model."""
    if freeze_model and method == "top":
        raise OptionError("ToP ranks by the model's own attention, so with a frozen model nothing could be learned.")
