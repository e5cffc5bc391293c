"""Gated feed-forward parts on one thread of OpenVINO, whose own kernel for them would end the process there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

openvino = pytest.importorskip("openvino")

from prunepass.backends._openvino_gates import divides_by_zero, keep_apart  # needs the runtime
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


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_clamp_stands_behind_the_activation_of_a_gate(activation: str, gated: bool) -> None:
    module, x = FeedForward(activation, gated).eval(), torch.randn(2, 7, 64)
    model = convert(torch.export.export(module, (x,)))
    assert keep_apart(model) == gated
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(torch.tensor(compiled(x.numpy())[0]), module(x), atol=1e-5, rtol=1e-4)
    # where the CPU has no bf16 the plugin computes in float32 all the same
    rough = openvino.compile_model(model, "CPU", ONE)(x.numpy())[0] if gated else compiled(x.numpy())[0]
    torch.testing.assert_close(torch.tensor(rough), module(x), atol=0.05, rtol=0.05)


def test_only_one_thread_below_float32_divides_by_zero() -> None:
    core = openvino.Core()
    assert not divides_by_zero(core, "CPU", {**ONE, "INFERENCE_PRECISION_HINT": "f32"})
    assert not divides_by_zero(core, "CPU", {"INFERENCE_NUM_THREADS": "many"})
    assert not divides_by_zero(core, "GPU", ONE)
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert divides_by_zero(core, "CPU", ONE) is has_bf16


LLAMA = f"""
import torch, zoo
from prunepass import Protect, PrunePlan, Stage
torch.manual_seed(0)
model = zoo.tiny("llama", "causal", dtype=torch.float32, hidden_size=64, intermediate_size=96)
x = {{k: v for k, v in zoo.batch([12, 9]).items() if k in ("input_ids", "attention_mask")}}
plan = PrunePlan((Stage(1, "0.6"),), "norm", Protect(last=1))
options = {{"plan": plan, "target": "openvino", "config": {ONE}}}
with torch.no_grad():
    print(torch.compile(model, backend="tokprune", options=options)(**x, use_cache=False).logits.shape)
"""


def test_a_llama_runs_on_one_thread() -> None:
    """In a process of its own: a division by zero would end this one."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 12," in done.stdout
