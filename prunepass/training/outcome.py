"""What training and search end with: a plan, what it costs, how well it does, and the folder it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunepass.plan import PrunePlan
from prunepass.training.output import OUTCOME_FILE

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The result of `prunepass train` or `prunepass search`.

    Attributes:
        plan: with its predictors, where it has trained ones.
        cost_share: of the dense cost, in the goal's unit, over the real lengths of the data.
        dense, pruned: figures on the evaluation or calibration data, by name.
        seconds: wall-clock time of the run.
        details: anything else worth keeping that JSON takes: versions, seeds, history.
        predictors: those of all cuts, as a plan that keeps every token; written to ``predictors/``, to search again.
        model, tokenizer: written beside the plan where the model was trained along; None where it is as it was.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without weights."""
        return {
            "plan": self.plan.to_dict(),
            "cost_share": self.cost_share,
            "dense": dict(self.dense),
            "pruned": dict(self.pruned),
            "seconds": self.seconds,
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
