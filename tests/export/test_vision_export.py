"""The language models of vision-language models as files, against `prune()`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tower_oracle import TOWER
from vision_oracle import PLAN, ROWS

import prunepass
import vision
from prunepass import PrunePlan
from prunepass.errors import ExportError, OptionError, PlanError
from prunepass.export.parts import towers_to_write
from prunepass.passes.pruned_vision import PrunedVision
from prunepass.plan.by_stream import plans_by_stream

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


def logits_of(folder: Path, to: str, call: dict[str, Tensor], output: str = "logits") -> Tensor:
    given: dict[str, np.ndarray[Any, Any]] = {name: value.numpy() for name, value in call.items()}
    if to == "pt2":
        found: Tensor = torch.export.load(folder / "model.pt2").module()(**call)[output]
        return found
    if to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        assert {port.name for port in session.get_inputs()} == set(given)
        return torch.from_numpy(session.run([output], given)[0])
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
    assert {port.any_name for port in compiled.inputs} == set(given)
    return torch.from_numpy(compiled(given)[output].copy())


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


BOTH = {"vision_tower": TOWER, "language_model": PLAN}


@cache
def pruned_in_both() -> PrunedVision:
    made = prunepass.prune(vision.tiny("llava", torch.float32), BOTH, prompt("llava", ROWS))
    assert isinstance(made, PrunedVision)
    return made


def check_both(folder: Path, to: str) -> None:
    """Files of LLaVA and its tower against `prune()`."""
    pruned = pruned_in_both()
    check(pruned, folder, "llava", to)
    for images in (1, 3):
        pixels = prompt("llava", ROWS)["pixel_values"][:images]
        with torch.no_grad():
            wanted = pruned.towers["model.vision_tower"](
                pixel_values=pixels, output_hidden_states=-1, return_dict=True
            ).last_hidden_state
            found = logits_of(folder / "model.vision_tower", to, {"pixel_values": pixels}, "last_hidden_state")
        assert (found - wanted).abs().max() < 1e-4


def test_the_program_of_a_tower() -> None:
    """It takes the images alone, whatever else the model calls the tower with."""
    model, inputs = vision.tiny("llava"), vision.prompt("llava", ROWS)
    plans = plans_by_stream({"vision_tower": TOWER}, model)
    ((path, made),) = towers_to_write(model, plans, inputs, widen=False).items()
    assert (path, made.inputs) == ("model.vision_tower", ("pixel_values",))
    assert made.outputs == ("last_hidden_state", "pooler_output", "hidden_states_2")
    pixels = inputs["pixel_values"][:1]
    with torch.no_grad():
        wanted = prunepass.prune(model.model.vision_tower, TOWER, {"pixel_values": pixels})(pixel_values=pixels)
        found = made.program.module()(pixel_values=pixels)
    for name in ("last_hidden_state", "hidden_states_2"):
        assert (found[name] - wanted.last_hidden_state).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "openvino", "onnx"])
def test_a_tower_is_a_file_of_its_own(to: Any, tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    folder = prunepass.export(model, BOTH, tmp_path / "out", to=to, example_inputs=inputs)
    check_both(folder, to)
    assert PrunePlan.from_pretrained(folder).stages == PLAN.stages
    assert PrunePlan.from_pretrained(folder / "model.vision_tower").stages == TOWER.stages


@pytest.mark.slow
def test_what_prune_gave_is_written_with_its_towers(tmp_path: Path) -> None:
    check_both(prunepass.export(pruned_in_both(), None, tmp_path / "out", to="pt2"), "pt2")


@pytest.mark.slow
def test_a_tower_alone_leaves_the_language_model_as_it_is(tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    folder = prunepass.export(model, {"vision_tower": TOWER}, tmp_path / "out", to="pt2", example_inputs=inputs)
    pruned = prunepass.prune(model, {"vision_tower": TOWER}, inputs)
    assert isinstance(pruned, PrunedVision)
    check(pruned, folder, "llava", "pt2")
    assert (folder / "model.vision_tower" / "model.pt2").is_file()
    assert not (folder / "prunepass.json").exists()


@pytest.mark.slow
def test_a_tower_beside_a_language_model_with_its_cache(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    folder = prunepass.export(model, BOTH, tmp_path / "out", stateful=True, example_inputs=inputs)
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pruned = pruned_in_both()
    with torch.no_grad():
        wanted, call = pruned(**inputs).logits[:, -1], pruned.language_inputs(**inputs)
    request = compiled.create_infer_request()
    given = {name: value.numpy() for name, value in call.items()} | {"beam_idx": np.arange(3, dtype=np.int32)}
    found = torch.from_numpy(request.infer(given)["logits"].copy())[:, -1]
    assert (found - wanted).abs().max() < 1e-4
    assert (folder / "model.vision_tower" / "openvino_model.xml").is_file()


class TestSeveralParts:
    """What `export` refuses of a mapping."""

    @pytest.mark.parametrize(
        ("plans", "options", "error", "said"),
        [
            ({"tower": TOWER}, {}, PlanError, r"'tower' names no module of LlavaForConditionalGeneration"),
            (BOTH, {"example_inputs": None}, OptionError, "with input_ids and pixel_values"),
            (BOTH, {"int8": [{}], "to": "onnx"}, OptionError, "inputs of one program"),
            (BOTH, {"pooled": True, "pooling": "mean"}, OptionError, "puts out logits"),
        ],
    )
    def test_refused(self, plans: Any, options: dict[str, Any], error: type, said: str, tmp_path: Path) -> None:
        given: dict[str, Any] = {"to": "pt2", "example_inputs": prompt("llava", ROWS), **options}
        if given["to"] == "onnx":
            pytest.importorskip("onnxruntime")
        with pytest.raises(error, match=said):
            prunepass.export(vision.tiny("llava", torch.float32), plans, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_a_pruned_model(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="pruned already"):
            prunepass.export(pruned_in_both(), BOTH, tmp_path / "out", to="pt2", example_inputs=prompt("llava", ROWS))


def test_a_list_of_plans(tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), prompt("llava", ROWS)
    with pytest.raises(OptionError, match="Give a single plan in place of the list"):
        prunepass.export(model, [PLAN, PLAN], tmp_path / "out", to="pt2", example_inputs=inputs)
