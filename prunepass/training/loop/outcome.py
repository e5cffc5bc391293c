"""What training and search end with: a plan, what it costs, how well it does, and the folder it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prunepass.plan import PrunePlan
from prunepass.training.loop.output import OUTCOME_FILE

__all__ = ["Outcome", "Taken"]


@dataclass(frozen=True)
class Taken:
    """Which state of training was taken as the best.

    Attributes:
        step: after which it was; of ``steps``.
        figure: what was compared: the metric that says most of the head, the larger the better; or ``"loss"``, the
            distance from the unpruned model's answers, of which the smallest is best.
        values: of it on the validation rows, by step, for each state that was looked at.
        rows: how many rows these are.
        unadapted: whether the model could adapt, and its own weights had not moved yet.
    """

    step: int
    steps: int
    figure: str
    values: Mapping[int, float]
    rows: int
    unadapted: bool = False

    @property
    def is_last(self) -> bool:
        """Whether training ended with it."""
        return self.step == max(self.values)


@dataclass(frozen=True)
class Outcome:
    """The result of `prunepass train` or `prunepass search`.

    Attributes:
        plan: with its predictors, where it has trained ones.
        cost_share: of the dense cost, in the goal's unit, over the real lengths of the data.
        dense, pruned: figures on the evaluation or calibration data, by name.
        seconds: wall-clock time of the run.
        details: anything else worth keeping that JSON takes: options, data, versions, seeds, history.
        predictors: those of all cuts, as a plan that keeps every token; written to ``predictors/``, to search again.
        model, tokenizer: written beside the plan where the model was trained along; None where it is as it was.
        truncated: figures of the dense model on texts cut to ``truncated_to`` tokens, at which they cost as much as
            pruned ones; empty where the head does not read a text as a whole.
        rows: how many the figures are of.
        intervals: by model (``"dense"``, ``"pruned"``, ``"truncated"``, ``"pruned - dense"``, ...) and figure, low and
            high end, at 95 %.
        taken: which state of training was taken; None where that was the last one without a choice.
    """

    plan: PrunePlan
    cost_share: float
    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)
    predictors: PrunePlan | None = None
    model: Any = None
    tokenizer: Any = None
    truncated: Mapping[str, float] = field(default_factory=dict)
    truncated_to: int | None = None
    rows: int | None = None
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    taken: Taken | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without weights."""
        return {
            "plan": self.plan.to_dict(),
            "cost_share": self.cost_share,
            "dense": dict(self.dense),
            "pruned": dict(self.pruned),
            "truncated": dict(self.truncated),
            "truncated_to": self.truncated_to,
            "rows": self.rows,
            "intervals": {name: dict(figures) for name, figures in self.intervals.items()},
            "seconds": self.seconds,
            "taken": None if self.taken is None else asdict(self.taken),
            **self.details,
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write the plan, its predictors, the figures, and the model and tokenizer where there are any."""
        self.plan.save_pretrained(folder)
        if self.predictors is not None:
            self.predictors.save_pretrained(folder / "predictors")
        for part in (self.model, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        (folder / OUTCOME_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
