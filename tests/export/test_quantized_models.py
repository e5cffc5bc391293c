"""Models that are quantised before they are pruned: what passes, and what is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from runtimes import bert, text
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers torch.ops.quantized_decomposed

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.errors import CaptureError, RefusalError

PLAN = PrunePlan([Stage(1, 0.6)])
OPS = torch.ops.quantized_decomposed


class FixedRange(nn.Module):
    """A linear layer as PT2E leaves it: its input goes to int8 and back."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        limits = (0.05, 3, -128, 127, torch.int8)
        return self.linear(OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *limits), *limits))


class OwnRange(FixedRange):
    def forward(self, x: Tensor) -> Tensor:
        scale, zero = OPS.choose_qparams.tensor(x, -128, 127, 1e-6, torch.int8)
        limits = (scale, zero, -128, 127, torch.int8)
        return self.linear(OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *limits), *limits))


def quantized(kind: type[FixedRange]) -> nn.Module:
    model = bert()
    for layer in model.encoder.layer:
        layer.intermediate.dense = kind(layer.intermediate.dense)
    return model


def test_fixed_ranges_leave_tokens_apart() -> None:
    model = quantized(FixedRange)
    gathered, masked = (prunepass.prune(model, PLAN, text(2, 9), mode=mode) for mode in ("gather", "mask"))
    with torch.no_grad():
        one, two, dense = (m(**text(3, 14)).last_hidden_state for m in (gathered, masked, model))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert (one - dense).abs().max() > 1e-3


def test_ranges_taken_over_all_tokens_are_refused() -> None:
    with pytest.raises((RefusalError, CaptureError), match=r"range taken over all tokens|choose_qparams"):
        prunepass.prune(quantized(OwnRange), PLAN, text(2, 9))


def test_packed_weights_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear})
    with pytest.raises(CaptureError, match=r"encoder.layer.0.* quantised already .*int8="):
        prunepass.prune(model, PLAN, text(2, 9))
