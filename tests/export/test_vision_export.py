"""The language models of vision-language models as files, against `prune()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vision_oracle import PLAN, ROWS

import prunepass
import vision
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.passes.pruned_vision import PrunedVision

CASES = [
    ("llava", "pt2"),
    ("llava", "openvino"),
    ("llava", "onnx"),
    ("gemma3", "openvino"),
    ("qwen3_vl", "openvino"),
    ("qwen3_vl", "onnx"),
]


def prompt(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in vision.prompt(name, rows).items()}


def logits_of(folder: Path, to: str, call: dict[str, Tensor]) -> Tensor:
    given: dict[str, np.ndarray[Any, Any]] = {name: value.numpy() for name, value in call.items()}
    if to == "pt2":
        found: Tensor = torch.export.load(folder / "model.pt2").module()(**call)["logits"]
        return found
    if to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        assert {port.name for port in session.get_inputs()} == set(given)
        return torch.from_numpy(session.run(["logits"], given)[0])
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
    assert {port.any_name for port in compiled.inputs} == set(given)
    return torch.from_numpy(compiled(given)["logits"].copy())


def check(pruned: PrunedVision, folder: Path, name: str, to: str) -> None:
    for rows in (ROWS, [[2, 2, 2], [25]], [[3, 4]], [[7]]):
        inputs = prompt(name, rows)
        with torch.no_grad():
            wanted, call = pruned(**inputs).logits, pruned.language_inputs(**inputs)
            found = logits_of(folder, to, call)
        live = inputs["attention_mask"].bool()
        assert (found - wanted)[live].abs().max() < 1e-4, rows


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), CASES)
def test_a_file_gives_what_prune_gives(name: str, to: Any, tmp_path: Path) -> None:
    model, inputs = vision.tiny(name, torch.float32), prompt(name, ROWS)
    pruned = prunepass.prune(model, PLAN, inputs)
    assert isinstance(pruned, PrunedVision)
    folder = prunepass.export(pruned, None, tmp_path / "out", to=to)
    assert PrunePlan.from_pretrained(folder).protect.only_ids == (vision.IMAGE,) or name != "llava"
    check(pruned, folder, name, to)


@pytest.mark.slow
def test_an_unpruned_file(tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    with torch.no_grad():
        wanted = model(**inputs).logits
    pruned = prunepass.prune(model, PLAN, inputs)
    assert isinstance(pruned, PrunedVision)
    folder = prunepass.export(model, PrunePlan(()), tmp_path / "out", to="pt2", example_inputs=inputs)
    with torch.no_grad():
        found = logits_of(folder, "pt2", pruned.language_inputs(**inputs))
    assert (found - wanted)[inputs["attention_mask"].bool()].abs().max() < 1e-4


def test_a_list_of_plans(tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    with pytest.raises(OptionError, match="Give a single plan in place of the list"):
        prunepass.export(model, [PLAN, PLAN], tmp_path / "out", to="pt2", example_inputs=inputs)
