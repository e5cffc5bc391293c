"""Texts through a folder of several plans: at the level that is asked for, or the folder's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import PLAN, texts
from transformers import AutoModel

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.bulk import Embedder
from prunepass.bulk.embedder import LEVELS_FORMAT
from prunepass.errors import ExportError, OptionError
from prunepass.export import manifest
from vocabulary import save_model, tiny_tokenizer

OTHER = PrunePlan([Stage(1, 0.3)], scorer="norm", restore="mean")


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_vectors_of_each_level(to: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = AutoModel.from_pretrained(save_model(tmp_path / "model", head="base", num_hidden_layers=3)).eval()
    shared: dict[str, Any] = {"to": to, "tokenizer": tiny_tokenizer(), "pooled": True, "pooling": "mean"}
    full: dict[str, Any] = {"precision": "f32"} if to == "openvino" else {}
    folder = prunepass.export(model, [PLAN, OTHER], tmp_path / "several", **shared)
    assert not (folder / "graph.pbtxt").exists()  # whose calculators would take a level for another input
    given = texts(6)
    rows = [dict(tiny_tokenizer()(one, return_tensors="pt")) for one in given]
    found = {}
    for number, plan in enumerate([PrunePlan(()), PLAN, OTHER]):
        found[number] = Embedder(folder, level=number, **full)(given)
        alone = prunepass.prune(model, plan, rows[0])
        with torch.no_grad():
            means = torch.stack([alone(**row).last_hidden_state[0].mean(0) for row in rows])
        wanted = torch.nn.functional.normalize(means, dim=-1).numpy()
        assert np.abs(found[number] - wanted).max() < 1e-4
    unsaid = Embedder(folder, **full)
    assert unsaid.level == 1
    assert np.array_equal(unsaid(given), found[1])
    assert np.abs(found[1] - found[2]).max() > 1e-3
    with pytest.raises(OptionError, match=r"has no level=3; it has 0, 1, 2 \(levels.json says which"):
        Embedder(folder, level=3)
    said = json.loads((folder / "levels.json").read_text())
    (folder / "levels.json").write_text(json.dumps(said | {"version": 99}))
    with pytest.raises(ExportError, match=r"format 'prunepass-levels', version 99; this prunepass reads .* version 1"):
        Embedder(folder)
    assert LEVELS_FORMAT == manifest.LEVELS_FORMAT


def test_a_folder_of_one_plan_has_no_levels(folder: Path) -> None:
    with pytest.raises(OptionError, match="is for a folder of several plans"):
        Embedder(folder, level=1)
    assert Embedder(folder).level is None
