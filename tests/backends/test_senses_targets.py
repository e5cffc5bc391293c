"""Pruned models that see or hear agree with eager execution on every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import prunepass
import senses
from prunepass import PrunePlan, Stage

PLAN = PrunePlan((Stage(1, "1/2"), Stage(3, 0.3, leave="merge")), "norm")
CONFIG = {"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}
EVERY_DAY = (("openvino", "dinov2-registers"),)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=() if (target, name) in EVERY_DAY else pytest.mark.slow)
        for target in ("openvino", "onnxruntime", "inductor")
        for name in ("dinov2-registers", "wav2vec2", "beit")
    ],
)
def test_targets_agree_with_eager(target: str, name: str, fresh_dynamo: Any) -> None:
    pytest.importorskip({"inductor": "torch"}.get(target, target))
    model, x = senses.tiny(name, torch.float32), senses.example(name, dtype=torch.float32)
    wanted, found = (
        harness.run(torch.compile(model, backend="tokprune", options={"plan": PLAN, "target": t, "config": config}), x)
        for t, config in (("eager", {}), (target, CONFIG.get(target, {})))
    )
    assert harness.difference(found, wanted, senses.live(name, x)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "wav2vec2"])
def test_a_folder_for_openvino_gives_the_same(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, x = senses.tiny(name, torch.float32), senses.example(name, dtype=torch.float32)
    folder = prunepass.export(model, PLAN, tmp_path / "out", to="openvino", example_inputs=x)
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", CONFIG["openvino"])
    for y in (x, senses.example(name, 3, seed=4, dtype=torch.float32)):
        wanted = harness.run(prunepass.prune(model, PLAN, x), y).last_hidden_state
        found = torch.from_numpy(compiled({k: v.numpy() for k, v in y.items()})["last_hidden_state"])
        assert float((found - wanted)[senses.live(name, y)].abs().max()) < 1e-4


def test_a_folder_for_openvino_takes_a_batch_of_no_images(tmp_path: Path) -> None:
    """WhisperPipeline of openvino-genai sends one to learn the shape of what comes out."""
    openvino = pytest.importorskip("openvino")
    plan = PrunePlan((Stage(1, "1/2"),), "norm")
    model, x = senses.tiny("deit", torch.float32), senses.example("deit", dtype=torch.float32)
    folder = prunepass.export(model, plan, tmp_path / "out", to="openvino", example_inputs=x)
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", CONFIG["openvino"])
    for rows in (0, 1, 3):
        y = {name: values[:1].expand(rows, *values.shape[1:]).contiguous() for name, values in x.items()}
        found = compiled({name: values.numpy() for name, values in y.items()})["last_hidden_state"]
        assert found.shape[0] == rows
    alone = harness.run(prunepass.prune(model, plan, x), {name: values[:1] for name, values in x.items()})
    assert float((torch.from_numpy(found) - alone.last_hidden_state).abs().max()) < 1e-4
