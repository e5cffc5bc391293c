"""A trained predictor on the hidden state (SDTP, eq. 1): two linear layers, a GELU between; at will on places, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunepass.errors import PlanError, WeightsError
from prunepass.scorers.base import ScoreInputs, Scorer

__all__ = ["MlpScorer", "predictor_shapes"]

_NAMES = ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
_POSITION = "position.weight"
_PLACES = 2  # from the start, and from the end
_SCALE = 8.0  # brings the logarithms of all lengths that models take to 0 to 1.6


class MlpScorer(Scorer):
    """``s = fc2(GELU(fc1(h)))`` with fc1: D -> H and fc2: H -> 1, or H -> 2: the keep minus the drop logit (eq. 2).

    Weights, by name: ``fc1.weight`` [H, D], ``fc1.bias`` [H], ``fc2.weight`` [1 or 2, H], ``fc2.bias`` [1 or 2]. They
    are cast to the model's dtype and moved to its device.

    With ``position.weight`` [H, 2] the predictor looks at a token's place, too: ``fc1(h) + position(p)`` with
    ``p = (log(1 + r), log(1 + e)) / 8``, r tokens from the row's start and e from the last that is not protected for
    its place, padding not counted. Models that turn queries and keys by their places (RoPE) keep them out of the hidden
    states, and what is near the end of a prompt matters most to what comes after it.
    """

    name: ClassVar[str] = "mlp"
    needs_weights: ClassVar[bool] = True

    position: nn.Linear | None

    def __init__(self, width: int, hidden: int, outputs: int = 1, positions: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, outputs)
        self.register_module("position", nn.Linear(_PLACES, hidden, bias=False) if positions else None)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] logits in the dtype of the hidden state."""
        inner = self.fc1(inputs.hidden)
        if self.position is not None:
            assert inputs.end is not None
            inner = inner + self.position(_places(inputs.rank, inputs.end).to(inner.dtype))
        logits: Tensor = self.fc2(nn.functional.gelu(inner))
        if self.fc2.out_features == 2:
            return logits[..., 0] - logits[..., 1]
        return logits.squeeze(-1)

    @classmethod
    def load(cls, options: Mapping[str, Any], weights: Mapping[str, Tensor], width: int, where: str) -> MlpScorer:
        """A predictor of the weights' own hidden width; see `Scorer.load` for the errors."""
        if options:
            raise PlanError(f"The scorer 'mlp' {where} takes no options, but the plan gives {dict(options)}.")
        if not weights:
            raise WeightsError(
                f"The scorer 'mlp' {where} needs trained weights {_NAMES}, but the plan carries none. Give the plan as "
                "the folder that training wrote, or take a training-free scorer such as 'attention'."
            )
        cls.check_weights(weights, where)
        first, second, positions = weights["fc1.weight"], weights["fc2.weight"], _POSITION in weights
        if first.shape[1] != width:
            raise WeightsError(
                f"The predictor {where} was trained for hidden states of width {first.shape[1]}, but this model's are "
                f"{width} wide. Take a plan trained for this model."
            )
        scorer = cls(width, first.shape[0], second.shape[0], positions)
        scorer.load_state_dict({k: v.to(torch.float32) for k, v in weights.items()})
        return scorer.requires_grad_(True)

    @classmethod
    def check_weights(cls, weights: Mapping[str, Tensor], where: str) -> None:
        """Raise `WeightsError` where these are not the weights of one predictor, whatever the width of its model."""
        names = sorted(weights)
        if names not in (_NAMES, [*_NAMES, _POSITION]):
            raise WeightsError(
                f"The scorer 'mlp' {where} needs trained weights {_NAMES}, and may have {_POSITION}, but the plan "
                f"carries {names}. Was the plan made for another scorer?"
            )
        if not all(value.is_floating_point() for value in weights.values()):
            raise WeightsError(f"The predictor {where} is damaged: its weights are not of a floating type.")
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        first, second = shapes["fc1.weight"], shapes["fc2.weight"]
        hidden, outputs = first[:1], second[:1]
        fit = len(first) == len(second) == 2 and outputs in ((1,), (2,)) and second[1:] == hidden
        biases = shapes["fc1.bias"] == hidden and shapes["fc2.bias"] == outputs
        if not fit or not biases or shapes.get(_POSITION, (*hidden, _PLACES)) != (*hidden, _PLACES):
            raise WeightsError(
                f"The predictor {where} is damaged: "
                f"{', '.join(f'{name} {shape}' for name, shape in sorted(shapes.items()))} do not fit together."
            )


def predictor_shapes(width: int, hidden: int, positions: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of a predictor's weights by name, with one output."""
    return {name: tuple(value.shape) for name, value in MlpScorer(width, hidden, 1, positions).state_dict().items()}


def _places(rank: Tensor, end: Tensor) -> Tensor:
    """[B, T, 2] float32 of ``rank`` [B, T] and ``end`` [B, 1]; see `MlpScorer`."""
    sides = torch.stack([rank, end - 1 - rank], dim=-1).clamp(min=0)
    return torch.log(sides.float() + 1) / _SCALE
