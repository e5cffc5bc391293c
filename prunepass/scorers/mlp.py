"""A trained predictor on the hidden state (SDTP, eq. 1): two linear layers with a GELU between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunepass.errors import PlanError, WeightsError
from prunepass.scorers.base import ScoreInputs, Scorer

__all__ = ["MlpScorer"]


class MlpScorer(Scorer):
    """``s = fc2(GELU(fc1(h)))`` with fc1: D -> H and fc2: H -> 1, or H -> 2: the keep minus the drop logit (eq. 2).

    Weights, by name: ``fc1.weight`` [H, D], ``fc1.bias`` [H], ``fc2.weight`` [1 or 2, H], ``fc2.bias`` [1 or 2]. They
    are cast to the model's dtype and moved to its device.
    """

    name: ClassVar[str] = "mlp"
    needs_weights: ClassVar[bool] = True

    def __init__(self, width: int, hidden: int, outputs: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] logits in the dtype of the hidden state."""
        return self.logits(inputs.hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., T] scores of hidden states [..., T, D]: all that this scorer looks at."""
        logits: Tensor = self.fc2(nn.functional.gelu(self.fc1(hidden)))
        if self.fc2.out_features == 2:
            return logits[..., 0] - logits[..., 1]
        return logits.squeeze(-1)

    @classmethod
    def load(cls, options: Mapping[str, Any], weights: Mapping[str, Tensor], width: int, where: str) -> MlpScorer:
        """A predictor of the weights' own hidden width; see `Scorer.load` for the errors."""
        if options:
            raise PlanError(f"The scorer 'mlp' {where} takes no options, but the plan gives {dict(options)}.")
        wanted = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
        if set(weights) != wanted:
            raise WeightsError(
                f"The scorer 'mlp' {where} needs trained weights {sorted(wanted)}, but the plan carries "
                f"{sorted(weights) or 'none'}. Give the plan as the folder that training wrote, or take a "
                "training-free scorer such as 'attention'."
            )
        first, second = weights["fc1.weight"], weights["fc2.weight"]
        if first.dim() != 2 or second.dim() != 2 or second.shape[0] not in (1, 2) or second.shape[1] != first.shape[0]:
            raise WeightsError(
                f"The predictor {where} is damaged: fc1.weight {tuple(first.shape)} and fc2.weight "
                f"{tuple(second.shape)} do not fit together."
            )
        if first.shape[1] != width:
            raise WeightsError(
                f"The predictor {where} was trained for hidden states of width {first.shape[1]}, but this model's are "
                f"{width} wide. Take a plan trained for this model."
            )
        scorer = cls(width, first.shape[0], second.shape[0])
        try:
            scorer.load_state_dict({k: v.to(torch.float32) for k, v in weights.items()})
        except RuntimeError as e:
            raise WeightsError(f"The predictor {where} is damaged: {e}") from None
        return scorer.requires_grad_(True)
