"""Attention sinks: one more score in a softmax, whose probability nothing reads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sweep.models import build
from torch import Tensor, nn

import harness
import hooks
import prunepass
import toys
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import RefusalError
from prunepass.graph.capture import capture_module
from prunepass.graph.sinks import SOFTMAX_WITH_SINKS

aten = torch.ops.aten


class Sinking(toys.Attention):
    """Softmax attention with a learned sink for each head.

    Args:
        form: how it is written: "plain", "shifted" (less the maximum), "scaled" (what attention gives, by the keys'
            share), "kept" (the sink's probability is read).
    """

    def __init__(self, form: str) -> None:
        super().__init__("softmax")
        self.form = form
        self.sinks = nn.Parameter(torch.randn(toys.HEADS))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, toys.HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
        if self.form == "scaled":
            share = (torch.logsumexp(scores, -1) - self.sinks.view(1, -1, 1)).sigmoid()
            read = scores.softmax(-1) @ v * share.unsqueeze(-1)
            return self.out(read.transpose(1, 2).reshape(b, s, -1))
        joined = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(b, -1, s, 1)], -1)
        if self.form == "shifted":
            joined = joined - joined.max(-1, keepdim=True).values
        weights = joined.softmax(-1)
        rest = weights[..., -1:] if self.form == "kept" else 0
        return self.out((weights[..., :-1] @ v + rest).transpose(1, 2).reshape(b, s, -1))


def toy(form: str) -> nn.Module:
    torch.manual_seed(0)
    model = toys.Encoder()
    for module in model.modules():
        if isinstance(module, toys.Block):
            module.attention = Sinking(form)
    return zoo.randomize(model.double().eval())


@pytest.mark.parametrize("form", ["plain", "shifted", "scaled"])
@pytest.mark.parametrize("scorer", ["attention", "norm"])
def test_gathering_agrees_with_masking(form: str, scorer: str) -> None:
    plan = PrunePlan((Stage(1, 0.6), Stage(2, 0.4, after_attention=True)), scorer, Protect(first=1))
    model = toy(form)
    gathered, masked = (prunepass.prune(model, plan, harness.example(), mode=mode) for mode in ("gather", "mask"))
    x = zoo.batch([13, 9, 4], seed=1)
    live = x["attention_mask"].bool()
    assert harness.difference(harness.run(gathered, x), harness.run(masked, x), live) < 1e-10
    assert harness.difference(harness.run(gathered, x), harness.run(model, x), live) > 1e-3


def test_a_scale_by_the_share_of_the_keys_is_a_sink() -> None:
    model = toy("scaled")
    graph = capture_module(model, harness.example()).graph_module
    assert not graph.graph.find_nodes(op="call_function", target=aten.logsumexp.default)
    assert len(graph.graph.find_nodes(op="call_function", target=SOFTMAX_WITH_SINKS)) == 4
    x = zoo.batch([13, 9, 4], seed=1)
    live = x["attention_mask"].bool()
    named, expected = (harness.tensors(harness.run(module, x)) for module in (graph, model))
    torch.testing.assert_close(next(iter(named.values()))[live], next(iter(expected.values()))[live])


def test_a_probability_of_the_sink_that_is_read_is_refused() -> None:
    with pytest.raises(RefusalError, match="attention sinks"):
        prunepass.prune(toy("kept"), PrunePlan((Stage(1, 0.6),), "norm"), harness.example())


@cache
def gpt_oss() -> Any:
    return build("gpt_oss")


def test_gpt_oss_agrees_with_hooks() -> None:
    """Sinks, windows and experts with biases in one model."""
    plan = PrunePlan((Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3)), "norm")
    captured = capture_module(gpt_oss(), harness.example())
    assert len(captured.graph_module.graph.find_nodes(op="call_function", target=SOFTMAX_WITH_SINKS)) == zoo.LAYERS
    pruned = harness.pruned(captured, plan).graph_module
    for side in ("right", "left"):
        x = zoo.batch([13, 9, 4], seed=1, side=side)
        expected = hooks.run_hooked(gpt_oss(), hooks.layers_of(gpt_oss(), zoo.LAYERS), plan, x).output
        assert harness.difference(harness.run(pruned, x), expected, x["attention_mask"].bool()) < 1e-10


@pytest.mark.parametrize("form", ["plain", pytest.param("scaled", marks=pytest.mark.slow)])
def test_exported_sinks_are_plain_operators(form: str, tmp_path: Any) -> None:
    model = toy(form).float()
    prunepass.export(
        model, PrunePlan((Stage(1, 0.6),), "norm"), tmp_path / "out", to="pt2", example_inputs=harness.example()
    )
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert not [n for n in program.graph.nodes if "prunepass" in str(n.target)]
    assert program.graph.find_nodes(op="call_function", target=aten.softmax.int)
