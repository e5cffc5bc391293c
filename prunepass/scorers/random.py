"""Random scores: the baseline that every other scorer has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunepass.errors import PlanError
from prunepass.scorers.base import ScoreInputs, Scorer

__all__ = ["RandomScorer"]

#: prime, and small, as OpenVINO's CPU plugin divides integers in float32: there products of two residues are exact
_MODULUS = 2039
#: two independent hashes make one score, or a row of some hundred tokens would be full of ties
_LANES = ((1_213, 1_511, 937), (571, 1_789, 1_361))


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
        """[B, T] float32, at least 0 and below the modulus, so that float16 can hold them."""
        high, low = (self._hash(inputs, lane).to(torch.float32) for lane in range(len(_LANES)))
        return high + low / _MODULUS

    def _hash(self, inputs: ScoreInputs, lane: int) -> Tensor:
        # the quotient of the seed tells seeds apart that have one residue
        seed = (self.seed + lane * (self.seed // _MODULUS + 1)) % _MODULUS
        state = _mix((inputs.rank + seed + 1) % _MODULUS, lane)
        if inputs.token_ids is not None:
            state = _mix((state + inputs.token_ids) % _MODULUS, lane)
        return _mix(state, lane)


def _mix(state: Tensor, lane: int) -> Tensor:
    """One step of a multiplicative hash with a quadratic term, modulo a prime."""
    offset, square, linear = _LANES[lane]
    squared = state * ((state + offset) % _MODULUS) % _MODULUS
    return (squared * square % _MODULUS + state * linear % _MODULUS) % _MODULUS
