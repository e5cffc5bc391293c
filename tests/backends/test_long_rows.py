"""Rows longer than what 8 bits count, in batches of unequal lengths: every target chooses as eager does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtimes import CONFIG, predictor
from torch import Tensor

import zoo
from prunepass import Protect, PrunePlan, ScorerSpec, Stage, prune
from prunepass.backends import get_target

LONGEST = 704
SCORERS = ("norm", "attention", "random", "mlp")
OPENVINO, OTHER = "openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)


def plan_of(scorer: str) -> PrunePlan:
    weights = predictor(stages=2, width=zoo.HIDDEN) if scorer == "mlp" else {}
    stages = [Stage(1, 0.9), Stage(2, "9999/20000")]
    return PrunePlan(stages, ScorerSpec(scorer), Protect(first=1, last=1), weights=weights)


def run(program: Any, target: str, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    lowering: Any = get_target(target)
    make = {"make": lowering.convert} if target == "openvino" else {}
    session = lowering._session(program, settings=CONFIG.get(target, {}), **make)
    return [session(list(x.values()))[0] for x in batches]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("target", [OPENVINO, OTHER])
def test_encoders(target: str, scorer: str) -> None:
    model = zoo.tiny("bert", dtype=torch.float32, max_position_embeddings=LONGEST, num_hidden_layers=3)
    batches = [zoo.batch([700, 560]), zoo.batch([512, 300], seed=1), zoo.batch([512, 460, 255, 256, 257], seed=2)]
    program = prune(model, plan_of(scorer), zoo.batch([11, 7])).exported
    with torch.no_grad():
        wanted = [program.module()(**x)[0] for x in batches]
    for found, exact in zip(run(program, target, batches), wanted, strict=True):
        # a choice between near ties may differ; a wrong count would change whole rows
        wrong = ((found - exact).abs().amax(-1) > 2e-3).float().mean(-1)
        assert wrong.max() < 0.01


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [OPENVINO, OTHER])
def test_left_padded_decoders(target: str, name: str) -> None:
    sizes = {"n_layer": 3, "n_positions": LONGEST} if name == "gpt2" else {"num_hidden_layers": 3}
    model = zoo.tiny(name, dtype=torch.float32, **sizes)
    batches = [zoo.batch([600, 290], side="left"), zoo.batch([300, 257, 40], side="left", seed=1)]
    program = prune(model, plan_of("norm"), zoo.batch([11, 7], side="left")).exported
    with torch.no_grad():
        wanted = [program.module()(**x)[0] for x in batches]
    for found, exact in zip(run(program, target, batches), wanted, strict=True):
        assert exact.isfinite().all()
        assert ((found - exact).abs().amax(-1) > 2e-3).float().mean(-1).max() < 0.01


@pytest.mark.parametrize("keep", [0.5, pytest.param(1, marks=pytest.mark.slow)])
def test_generate_on_a_left_padded_batch(keep: float) -> None:
    """The text of target "openvino" is that of eager PyTorch."""
    inputs = zoo.batch([24, 9], side="left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": zoo.PAD}
    plan = PrunePlan([Stage(1, keep)], "norm", Protect(first=1, last=1))
    texts = []
    for target in ("eager", "openvino"):
        torch._dynamo.reset()
        model: Any = zoo.tiny("llama", "causal", dtype=torch.float32, use_cache=True, num_hidden_layers=2)
        settings = {"plan": plan, "target": target, "config": CONFIG.get(target, {})}
        model.compile(backend="tokprune", dynamic=True, options=settings)
        with torch.no_grad():
            texts.append(model.generate(**inputs, **options))
    assert torch.equal(*texts)
