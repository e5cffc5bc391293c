"""A small trained plan, and the form of the messages on plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunepass.errors import PruneError
from prunepass.plan import PrunePlan, Stage


def predictor(stage: int = 0, width: int = 4, hidden: int = 3) -> dict[str, Tensor]:
    shapes = {"fc1.weight": (hidden, width), "fc1.bias": (hidden,), "fc2.weight": (1, hidden), "fc2.bias": (1,)}
    return {f"stages.{stage}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def trained(keep: Any = 0.5, **more: Tensor) -> PrunePlan:
    return PrunePlan((Stage(1, keep),), "mlp", weights=predictor() | more)


def one_line(error: pytest.ExceptionInfo[PruneError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text
