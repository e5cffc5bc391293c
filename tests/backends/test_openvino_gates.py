"""Gated feed-forward parts on one thread of OpenVINO: by the form of the graph they are kept out of its own kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

openvino = pytest.importorskip("openvino")

from prunepass.backends import openvino as target  # needs the runtime
from prunepass.backends._openvino_gates import divides_by_zero, keep_apart
from prunepass.backends.openvino import convert

ONE = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "bf16"}


class FeedForward(nn.Module):
    def __init__(self, activation: str, gated: bool) -> None:
        super().__init__()
        self.activation, self.gated = getattr(F, activation), gated
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        act = self.activation(self.gate(x))
        return self.down(act * self.up(x) if self.gated else act)  # type: ignore[no-any-return]


def clamps_behind_activations(model: Any) -> int:
    """How many products with an activation have a clamp in between; -1 where one has none."""
    count = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Multiply":
            kinds = [value.get_node().get_type_name() for value in op.input_values()]
            if {"Swish", "Gelu"}.intersection(kinds):
                return -1
            count += "Clamp" in kinds
    return count


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_clamp_stands_behind_the_activation_of_a_gate(activation: str, gated: bool) -> None:
    module, x = FeedForward(activation, gated).eval(), torch.randn(2, 7, 64)
    model = convert(torch.export.export(module, (x,)))
    assert clamps_behind_activations(model) == (-1 if gated else 0)
    assert keep_apart(model) == gated
    assert clamps_behind_activations(model) == gated
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(torch.tensor(compiled(x.numpy())[0]), module(x), atol=1e-5, rtol=1e-4)


def test_only_one_thread_below_float32_divides_by_zero() -> None:
    core = openvino.Core()
    assert not divides_by_zero(core, "CPU", {**ONE, "INFERENCE_PRECISION_HINT": "f32"})
    assert not divides_by_zero(core, "CPU", {"INFERENCE_NUM_THREADS": "many"})
    assert not divides_by_zero(core, "GPU", ONE)
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert divides_by_zero(core, "CPU", ONE) is has_bf16


@pytest.mark.parametrize("needed", [True, False])
def test_the_target_clamps_where_it_is_needed_and_nowhere_else(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the compiler is looked at, and compiled for float32 whatever was asked for."""
    seen: list[Any] = []
    compile_model = target._compile

    def look(model: Any, settings: Any) -> Any:
        seen.append(model)
        return compile_model(model, {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(target, "_compile", look)
    monkeypatch.setattr(target, "divides_by_zero", lambda *_: needed)
    module, x = FeedForward("silu", gated=True).eval(), torch.randn(2, 7, 64)
    fast = torch.compile(module, backend=lambda gm, inputs: target.lower(gm, inputs, config={}))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), module(x), atol=1e-5, rtol=1e-4)
    assert [clamps_behind_activations(model) for model in seen] == [1 if needed else -1]
