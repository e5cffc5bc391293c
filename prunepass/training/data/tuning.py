"""What can be asked of `prunepass tune`: a frozen dataclass, checked on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from prunepass.errors import OptionError, option
from prunepass.training.data.declare import Declared, at_least, check, not_below_zero, positive
from prunepass.training.data.options import (
    BatchSize,
    MaxLength,
    Model,
    Out,
    Overwrite,
    Repeats,
    RowsTaken,
    Seed,
    Source,
)

__all__ = ["TuneOptions"]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{option('budgets')} takes shares such as 0.7,0.5, not {text!r}.") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _each_share(name: str, value: Any) -> None:
    if not value or not all(0 < share < 1 for share in value):
        raise OptionError(f"{option(name)} takes shares of the dense FLOPs between 0 and 1, such as 0.7,0.5.")


def _each_scorer(name: str, value: Any) -> None:
    from prunepass.scorers import names

    free = [scorer for scorer in names() if scorer != "mlp"]
    for one in value:
        if one not in free:
            raise OptionError(f"{option(name)}: {one!r} is no scorer without weights; choose of {', '.join(free)}.")


@dataclass(frozen=True)
class TuneOptions:
    """Everything that `prunepass tune` takes.

    Raises:
        OptionError: a value that cannot be; the message says which and what can.
    """

    model: Model
    data: Source
    out: Out
    loss: Annotated[
        float,
        Declared(
            "Points of the score that may be lost: hundredths of accuracy, F1, ...; without labels, hundredths of the "
            "distance from the dense model's answers.",
            check=not_below_zero,
        ),
    ] = 1.0
    target: Annotated[
        list[str] | None, Declared("Target to try; may be given more than once. Default: all that are installed.")
    ] = None
    budgets: Annotated[
        tuple[float, ...],
        Declared("Shares of the dense FLOPs to find plans for.", check=_each_share, parse=_shares),
    ] = (0.7, 0.55, 0.4, 0.3)
    scorers: Annotated[
        tuple[str, ...], Declared("What ranks tokens in those plans, untrained.", check=_each_scorer, parse=_names)
    ] = ("norm", "attention", "likeness")
    train: Annotated[
        bool,
        Declared("Also train a plan and the model for each budget, while they keep the score.", flags=("--train",)),
    ] = False
    epochs: Annotated[float, Declared("With --train: passes over the rows.", check=positive)] = 2.0
    rows: RowsTaken = None
    timed: Annotated[int, Declared("How many texts to time, from short to long.", check=at_least(1))] = 24
    repeats: Repeats = 5
    max_evaluations: Annotated[int, Declared("How many plans a search tries at most.", check=at_least(12))] = 40
    batch_size: BatchSize = 32
    max_length: MaxLength = None
    seed: Seed = 0
    resume: Annotated[bool, Declared("Go on with the plans in OUT.tune.", flags=("--resume",))] = False
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check(self)
        if self.rows is not None:
            at_least(4)("rows", self.rows)  # half of them choose, half report
