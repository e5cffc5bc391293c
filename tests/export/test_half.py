"""Half precision on the way out: models in float16 or bfloat16, and what is converted to them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import bert, text
from torch import Tensor

import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PruneError

PLAN = PrunePlan([Stage(1, "1/2")], "norm", Protect(first=1, token_ids=(5,)))  # type: ignore[arg-type]
#: scores of whole numbers: the choice is one in every dtype, where norms in bfloat16 are near ties
STEADY = PrunePlan([Stage(1, "1/2")], "random")  # type: ignore[arg-type]
HALF = (torch.float16, torch.bfloat16)


def expected(dtype: torch.dtype, inputs: Mapping[str, Tensor], plan: PrunePlan = STEADY) -> Tensor:
    """The last hidden state of the pruned model with its weights rounded to ``dtype``, computed in float32."""
    module = prunepass.prune(bert(num_layers=2).to(dtype).float(), plan, inputs)
    with torch.no_grad():
        found: Tensor = module(**inputs).last_hidden_state
    return found


def openvino_run(folder: Path, inputs: Mapping[str, Tensor], precision: str = "f32") -> Any:
    openvino = pytest.importorskip("openvino")
    config = {"INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
    return compiled({k: v.numpy() for k, v in inputs.items()})["last_hidden_state"].copy()


def onnx_run(file: Any, inputs: Mapping[str, Tensor]) -> Any:
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["last_hidden_state"], {k: v.numpy() for k, v in inputs.items()})[0]


@pytest.mark.parametrize("dtype", HALF)
def test_openvino_folders_of_half_models_speak_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = text(3, 20)
    folder = prunepass.export(bert(num_layers=2).to(dtype), STEADY, tmp_path / "out", example_inputs=text(2, 9))
    found = openvino_run(folder, inputs)
    assert found.dtype == np.float32
    assert np.abs(found - expected(dtype, inputs).numpy()).max() < 6e-2


def test_onnx_files_of_float16_models_speak_float32(tmp_path: Path) -> None:
    model, inputs = bert(num_layers=2).half(), text(3, 20)
    folder = prunepass.export(model, STEADY, tmp_path / "out", to="onnx", example_inputs=text(2, 9))
    found = onnx_run(folder / "model.onnx", inputs)
    assert found.dtype == np.float32
    assert np.abs(found - expected(torch.float16, inputs).numpy()).max() < 2e-2


def test_onnx_files_of_bfloat16_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"bfloat16.*model\.float\(\)"):
        prunepass.export(bert(num_layers=2).bfloat16(), PLAN, tmp_path / "out", to="onnx", example_inputs=text(2, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", HALF)
def test_embeddings_go_in_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = bert(num_layers=2).to(dtype)
    inputs = text(2, 9)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        embedded = {"inputs_embeds": model.embeddings.word_embeddings(ids), **inputs}
    plan = STEADY
    folder = prunepass.export(model, plan, tmp_path / "out", example_inputs=embedded)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in embedded.items()}
    module = prunepass.prune(bert(num_layers=2).to(dtype).float(), plan, wide)
    with torch.no_grad():
        assert np.abs(openvino_run(folder, wide) - module(**wide).last_hidden_state.numpy()).max() < 6e-2


@pytest.mark.parametrize("dtype", HALF)
def test_stateful_folders_of_half_models_speak_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    tiny = {"num_hidden_layers": 2, "use_cache": True, "eos_token_id": None, "dtype": torch.float32}
    model = zoo.tiny("llama", "causal", **tiny).to(dtype)
    plan = PrunePlan([Stage(1, "1/2")], "random", Protect(first=1, last=1))  # type: ignore[arg-type]
    folder = prunepass.export(model, plan, tmp_path / "out")
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config).create_infer_request()
    ids = torch.arange(5, 25).reshape(1, 20)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(20)[None]}
    found = request.infer({**{k: v.numpy() for k, v in inputs.items()}, "beam_idx": np.zeros(1, np.int32)})["logits"]
    assert found.dtype == np.float32
    reference = prunepass.prune(model.float(), plan, {**inputs, "use_cache": False})
    with torch.no_grad():
        logits = reference(**inputs, use_cache=False).logits[:, -1:].numpy()
    assert np.abs(found - logits).max() < 2e-2 * np.abs(logits).max()


def test_an_onnx_file_converted_to_float16_keeps_the_same_tokens(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    folder = prunepass.export(bert(num_layers=2), PLAN, tmp_path / "out", to="onnx", example_inputs=text(2, 9))
    shapes = [[d.dim_param for d in v.type.tensor_type.shape.dim] for v in onnx.load(folder / "model.onnx").graph.input]
    assert shapes == [["batch", "length"]] * 2
    half = float16.convert_float_to_float16(onnx.load(folder / "model.onnx")).SerializeToString()
    for size in ((1, 1), (3, 7), (4, 33), (2, 64)):
        inputs = text(*size)  # the first row is padded: its budget is not the width
        wide = onnx_run(folder / "model.onnx", inputs)
        # a token that stays in one and leaves in the other differs by 0.1 to 1.5
        assert np.abs(onnx_run(half, inputs).astype(np.float32) - wide).max() < 2e-2, size


def test_openvino_compressed_to_float16_keeps_the_same_tokens(tmp_path: Path) -> None:
    model = bert(num_layers=2)
    folder = prunepass.export(model, PLAN, tmp_path / "out", example_inputs=text(2, 9), compress_to_fp16=True)
    for size in ((3, 7), (4, 33)):
        inputs = text(*size)
        wide = expected(torch.float32, inputs, PLAN).numpy()
        assert np.abs(openvino_run(folder, inputs) - wide).max() < 2e-2, size


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_models_in_other_types_run_in_pytorch(dtype: torch.dtype) -> None:
    inputs = text(3, 20)
    module = prunepass.prune(bert(num_layers=2).to(dtype), STEADY, inputs)
    with torch.no_grad():
        found = module(**inputs).last_hidden_state
    assert found.dtype == dtype
    assert (found.float() - expected(dtype, inputs)).abs().max() < 5e-2
