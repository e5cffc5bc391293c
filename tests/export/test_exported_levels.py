"""Folders of several plans: at each level what that plan alone puts out, and a level for calls that name none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import bert, predictor, text
from test_export import load
from torch import Tensor

import prunepass
import zoo
from prunepass import PrunePlan, Stage
from prunepass.bulk import embedder as bulk_embedder
from prunepass.bulk import engines
from prunepass.errors import OptionError
from prunepass.export import manifest
from prunepass.plan.levels import LEVEL
from vocabulary import tiny_tokenizer

PLANS = [
    PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], "mlp", weights=predictor(0, 2)),
    PrunePlan([Stage(2, 0.5)], "mlp", weights=predictor(1)),
]
FORMATS = ("openvino", "onnx", "pt2")


def full(rows: int, length: int) -> dict[str, Tensor]:
    inputs = text(rows, length)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def alone() -> list[Callable[..., Any]]:
    """What each level is to put out: the dense model, then each plan alone."""
    return [bert(), *(prunepass.prune(bert(), plan, full(2, 9)) for plan in PLANS)]


@pytest.fixture(scope="module", params=FORMATS, name="folder")
def _folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prunepass.export(bert(), PLANS, tmp_path_factory.mktemp("levels") / "out", to=request.param)


def test_each_level_is_its_plan_and_the_first_one_where_none_is_said(folder: Path) -> None:
    run, models = load(folder), alone()
    for length, rows in ((24, 2), (1, 1), (7, 3)):
        x = full(rows, length)
        there = x["attention_mask"].bool()
        unsaid = None if (folder / "model.pt2").exists() else run(x)["last_hidden_state"]
        found = [run({**x, LEVEL: torch.tensor([number])})["last_hidden_state"] for number in (0, 1, 2, 9)]
        for number, model in enumerate(models):
            with torch.no_grad():
                assert (found[number] - model(**x).last_hidden_state)[there].abs().max() < 1e-4, (number, length)
        assert torch.equal(found[3], found[2])
        if unsaid is not None and length == 24:
            assert torch.equal(unsaid, found[1])
            assert (found[1] - found[2]).abs().max() > 1e-3


def test_genai_runs_by_the_first_plan(tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    plans = [PrunePlan([Stage(1, keep)], "norm", restore="mean") for keep in (0.5, 0.3)]
    shared: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "pooled": True, "pooling": "mean"}
    several = prunepass.export(bert(), plans, tmp_path / "several", **shared)
    single = prunepass.export(bert(), plans[0], tmp_path / "single", **shared)
    texts = ["the cat sat on the mat", "good film"]
    found, wanted = (
        np.array(genai.TextEmbeddingPipeline(str(one), "CPU", INFERENCE_PRECISION_HINT="f32").embed_documents(texts))
        for one in (several, single)
    )
    assert np.abs(found - wanted).max() < 1e-4


def test_the_folder_names_its_levels(folder: Path) -> None:
    said = json.loads((folder / "levels.json").read_text())
    assert (said["input"], said["default"]) == ("level", 1)
    assert [entry["plan"] for entry in said["levels"]] == [None, "levels/1", "levels/2"]
    assert said["levels"][2]["stages"] == [{"layer": 2, "keep": "1/2"}]
    assert PrunePlan.from_pretrained(folder / "levels" / "2") == PLANS[1]
    assert not (folder / "prunepass.json").exists()
    # read by workers that must not load torch, so each room has its own
    assert bulk_embedder.LEVELS_FILE == manifest.LEVELS_FILE
    assert engines.LEVEL == LEVEL


def test_int8_and_fixed_sizes(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    batches = [full(2, 12) for _ in range(3)]
    folder = prunepass.export(bert(), PLANS, tmp_path / "out", int8=batches, batch=2, length=12)
    run, x = load(folder), full(2, 12)
    found = [run({**x, LEVEL: torch.tensor([i])})["last_hidden_state"] for i in range(3)]
    assert all(value.isfinite().all() for value in found)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_generating_model_has_no_cache_inside(tmp_path: Path) -> None:
    model = zoo.tiny("llama", "causal").float()
    plan = PrunePlan([Stage(1, 0.5)], "norm", prunepass.Protect(first=1, last=1))
    with pytest.raises(OptionError, match=r"takes one plan.*pass stateful=False"):
        prunepass.export(model, [plan], tmp_path / "out", stateful=True)


def test_stages_have_few_operators_more(folder: Path, tmp_path: Path) -> None:
    """Counts of all stages are worked out at once, which pays for looking them up."""
    if not (folder / "model.onnx").exists():
        return
    from onnx import load as read

    single = prunepass.export(bert(), PLANS[0], tmp_path / "single", to="onnx")
    one, several = (
        sum(node.op_type != "Constant" for node in read(file / "model.onnx").graph.node) for file in (single, folder)
    )
    lookups = 2 * 4  # of one predictor's parameters, which differ between the plans
    assert several - lookups <= one * 1.05, (one, several)  # of three tiny layers


def test_the_level_is_a_row_of_one_number_or_none(folder: Path) -> None:
    if not (folder / "openvino_model.xml").exists():
        return
    import openvino

    (port,) = [p for p in openvino.Core().read_model(folder / "openvino_model.xml").inputs if p.get_any_name() == LEVEL]
    assert port.get_element_type() == openvino.Type.i64
    assert port.get_partial_shape() == openvino.PartialShape([openvino.Dimension(0, 1)])
