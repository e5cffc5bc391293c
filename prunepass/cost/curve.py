"""Curves through measured points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Curve", "never_falling"]


@dataclass(frozen=True)
class Curve:
    """Piecewise-linear through points; flat before the first, and going on as the last piece does after the last."""

    lengths: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, n: Tensor) -> Tensor:
        """Its value at counts ``n`` (floating, any shape), in their dtype; differentiable but at the points."""
        if len(self.lengths) == 1:
            return torch.full_like(n, self.values[0]) + 0 * n
        x, y = (torch.tensor(points, dtype=n.dtype, device=n.device) for points in (self.lengths, self.values))
        slope = y.diff() / x.diff()
        piece = torch.bucketize(n.detach(), x[1:-1])
        return y[piece] + slope[piece] * (n.clamp(min=self.lengths[0]) - x[piece])


def never_falling(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest sequence (least squares) that never falls, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []  # mean, and how many values it stands for
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            below, count = pools.pop()
            mean, size = (mean * size + below * count) / (size + count), size + count
        pools.append((mean, size))
    return tuple(mean for mean, size in pools for _ in range(size))
