"""Random scores: the baseline that every other scorer has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.errors import PlanError
from prunepass.scorers.base import ScoreInputs, Scorer

__all__ = ["RandomScorer"]

_MODULUS = 46_337  # prime; a product of two residues fits 32 bits, in which OpenVINO's CPU plugin computes integers


class RandomScorer(Scorer):
    """Uniform scores by a hash of the seed, the token's place in its row and its id.

    Small integer arithmetic, so that every backend, batch and padding gives the same numbers; no generator, so that the
    same input gives the same output.
    """

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise PlanError(f"The seed of the scorer 'random' must be a whole number, not {seed!r}.")
        self.seed = seed

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32 whole numbers, at least 0 and below the modulus."""
        state = (inputs.rank + (self.seed % _MODULUS) + 1) % _MODULUS
        state = _mix(state)
        if inputs.token_ids is not None:
            state = _mix((state + inputs.token_ids) % _MODULUS)
        state = _mix(state)
        return state.to(torch.float32)


def _mix(state: Tensor) -> Tensor:
    """One step of a multiplicative hash with a quadratic term, modulo a prime."""
    squared = state * ((state + 11_213) % _MODULUS) % _MODULUS
    return (squared * 30_011 % _MODULUS + state * 19_937 % _MODULUS) % _MODULUS
