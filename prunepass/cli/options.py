"""Options that several commands have, each declared once, and what becomes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from prunepass.cli.texts import docstrings
from prunepass.errors import OptionError, option
from prunepass.export.pooling import MODES
from prunepass.generation.stateful import generates
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice, check_short, choose
from prunepass.plan.draft import Draft, Planned
from prunepass.training.data.declare import Declared, check, one_of
from prunepass.training.data.options import MaxLength, Model, TargetConfig

if TYPE_CHECKING:
    from prunepass.export.hub import Loaded

__all__ = [
    "EXAMPLE_TEXTS",
    "Json",
    "LengthOptions",
    "ModelOptions",
    "PlanOptions",
    "PlansOptions",
    "PoolingOptions",
    "SettingOptions",
    "TextOptions",
    "scorer_of",
    "texts_of",
]

#: that `explain` traces the model with; lengths are taken of all texts
EXAMPLE_TEXTS = 8

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, to stdout.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    model: Model
    dtype: Annotated[str, Declared("Type of the weights: float32, bfloat16 or float16.")] = "float32"

    def load(self) -> Loaded:
        """The model and its tokenizer. Raises as `export.hub.load`."""
        from prunepass.export.hub import load

        return load(self.model, dtype=self.dtype)


@dataclass(frozen=True)
class SettingOptions:
    """How the target is set up."""

    config: TargetConfig = None


@dataclass(frozen=True)
class LengthOptions:
    """How much of a text the model sees."""

    max_length: MaxLength = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PlanOptions:
    """Which plan: one that is somewhere, or its short form."""

    plan: Annotated[
        list[str] | None,
        Declared(
            "Folder of a saved plan, name of one that comes along, or 'default' for the training-free one. "
            "Default: the plan in MODEL's folder, or else the training-free one."
        ),
    ] = None
    keep: Annotated[
        str | None,
        Declared(
            "Instead of --plan. A list has one number a layer, each a share of the row's original tokens (0.7,0.5). "
            "One number is the share of the tokens that reach a layer: 0.5 at two layers leaves 1/2, then 1/4."
        ),
    ] = None
    layers: Annotated[str | None, Declared("With --keep: 0-based blocks to prune before, such as 2,4.")] = None
    scorer: Annotated[
        str | None,
        Declared(
            "With --keep: how tokens are scored, with options behind a colon (attention:rows=64) or as JSON. Default: "
            "attention."
        ),
    ] = None
    restore: Annotated[
        str | None,
        Declared(
            "With --keep: what outputs carry at pruned positions: last (the state that the token left with), mean (of "
            "the tokens kept: for mean-pooled embeddings), zeros, or none (outputs hold the tokens kept alone, for an "
            "encoder whose decoder reads them). Default: mean for a model whose outputs are states of all tokens, or a "
            "mean of them; last for others."
        ),
    ] = None
    leave: Annotated[
        str | None,
        Declared("With --keep: how tokens leave: drop (default), or merge (averaged into the nearest kept one)."),
    ] = None

    @property
    def given(self) -> str | list[str] | None:
        """What stands for ``plan``: one, or the list of several, which only some commands take."""
        plans: list[str] = list(self.plan or ())
        return plans if len(plans) > 1 else next(iter(plans), None)

    def read(self) -> Choice | None:
        """What is said of a plan, read before the model is loaded; None where nothing is.

        Raises:
            OptionError, PlanError, WeightsError: as `choose`.
        """
        short = {name: getattr(self, name) for name in ("keep", "layers", "scorer", "restore", "leave")}
        given = {name: value for name, value in short.items() if value is not None}
        check_short(self.given, given)
        if given and "keep" not in given:
            raise OptionError(f"{option(next(iter(given)))} goes with {option('keep')} and {option('layers')}.")
        if "keep" in given:
            given["keep"] = self.keep.split(",") if self.keep and "," in self.keep else self.keep
            given["layers"] = [_whole_number(part) for part in (self.layers or "").split(",")]
        if self.scorer is not None:
            given["scorer"] = scorer_of(self.scorer)
        if isinstance(self.given, list) and not isinstance(self, PlansOptions):
            raise OptionError(f"Give {option('plan')} once; this command looks at one plan.")
        return choose(self.given, None, given) if given or self.given is not None else None

    def choose(self, said: Choice | None, loaded: Loaded) -> Choice:
        """The plan for a model, of what `read` gave. The short form protects the last token where the model generates,
        which predicts the next token from it."""
        if said is None or self.keep is None or not generates(loaded.model):
            return choose(said, loaded.model)
        return replace(said, plan=_protecting_last(said.plan))


@dataclass(frozen=True)
class PlansOptions(PlanOptions):
    """Which plan, or which plans of one program: ``plan`` may have several."""


def _protecting_last(plan: Planned) -> Planned:
    if isinstance(plan, Draft):
        return Draft({**plan.given, "protect": replace(plan.given["protect"], last=1)})
    assert isinstance(plan, PrunePlan)  # a short form is one plan
    return replace(plan, protect=replace(plan.protect, last=1))


def scorer_of(text: str) -> str | dict[str, Any]:
    """A scorer as a plan takes it, of ``name``, ``name:option=value,option=value`` or JSON.

    Raises:
        OptionError: it is none of these.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as e:
            raise OptionError(f"{option('scorer')} is not valid JSON: {e}.") from None
    name, colon, rest = text.partition(":")
    if not colon:
        return text
    found: dict[str, Any] = {"name": name}
    for pair in rest.split(","):
        key, equals, value = pair.partition("=")
        if not name or not key or not equals:
            raise OptionError(
                f"{option('scorer', text)} cannot be read; write NAME:OPTION=VALUE, such as attention:rows=64."
            )
        if key.strip() in found:
            raise OptionError(f"{option('scorer', text)} gives {key.strip()!r} twice.")
        found[key.strip()] = _plain(value)
    return found


def _plain(value: str) -> Any:
    """A number or a flag where it is written as one, else the text. Lists need the form of JSON."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"{option('layers')} must be block numbers such as 2,4; {text.strip()!r} is none.") from None


#: evaluated here, as its check needs the names
Mode: TypeAlias = Annotated[
    str | None,
    Declared(
        "With --pooled: mean (of the tokens), cls (the first token) or last. Default: as the files of "
        "sentence-transformers in MODEL's folder say.",
        check=one_of(lambda: MODES),
    ),
]


@dataclass(frozen=True)
class PoolingOptions:
    """Whether one vector a text is put out, and how it is made."""

    pooled: Annotated[
        bool,
        Declared("Put out one vector a text, pooled and normalised, as servers of embeddings want it.", ("--pooled",)),
    ] = False
    pooling: Mode = None
    normalize: Annotated[
        bool | None,
        Declared(
            "With --pooled: whether vectors get length 1. Default: as those files say, else yes.",
            ("--normalize/--no-normalize",),
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TextOptions:
    """What a model is run on."""

    text: Annotated[list[str] | None, Declared("Input text; may be given more than once.")] = None
    file: Annotated[
        Path | None,
        Declared("UTF-8 file with one text a line. Default input: the docstrings of installed packages."),
    ] = None


def texts_of(given: TextOptions, *, count: int | None = None) -> list[str]:
    """The texts given, or those of the file; of a file ``count``, where that is given. Else some docstrings.

    Raises:
        OptionError: both are given, or the file cannot be read or has no text in it.
    """
    if given.text and given.file is not None:
        raise OptionError(f"Give {option('text')} or {option('file')}, not both.")
    if given.text:
        return given.text
    if given.file is None:
        found = list(docstrings(minimum_characters=1500).values())
        wanted = count or EXAMPLE_TEXTS
        return found[:: max(1, len(found) // wanted)][:wanted]
    try:
        lines = [line.strip() for line in given.file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"{given.file} cannot be read as UTF-8 text: {e}") from None
    texts = [line for line in lines if line]
    if not texts:
        raise OptionError(f"{given.file} has no text in it.")
    return texts[:count]
