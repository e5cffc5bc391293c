"""Targets by name, those of other packages, missing packages, and the fusions each target keeps."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runtimes import LAYERS, bert, text
from torch import nn

import prunepass.backends as backends
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.backends import fusion_counts, get_target, target_names
from prunepass.errors import MissingExtraError, OptionError
from prunepass.graph.capture import capture_module
from prunepass.pipeline import prune


def test_names() -> None:
    assert {"inductor", "openvino", "onnxruntime", "eager"} <= set(target_names())
    with pytest.raises(OptionError, match=r"'openvin'.*Did you mean 'openvino'.*eager"):
        get_target("openvin")


def test_a_target_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(lower=lambda gm, example_inputs, *, config=None: gm, fusion_counts=None)
    entry = SimpleNamespace(name="elsewhere", load=lambda: target)
    monkeypatch.setattr(backends, "entry_points", lambda *, group: [entry] if group == "prunepass.backends" else [])
    assert get_target("elsewhere") is target
    assert "elsewhere" in target_names()


def test_a_new_backend_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newest.py").write_text(
        "def lower(graph_module, example_inputs, *, config=None):\n    return graph_module\n"
    )
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    try:
        assert {"newest", "openvino"} <= set(target_names())
        assert not {"_helper", "cache"} & set(target_names())
        gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
        assert get_target("newest").lower(gm, []) is gm
    finally:
        sys.modules.pop("prunepass.backends.newest", None)
    for no_target in ("_helper", "cache"):
        with pytest.raises(OptionError, match="Unknown target"):
            get_target(no_target)


@pytest.mark.parametrize(("target", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_a_missing_package(target: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, target, None)
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(MissingExtraError, match=rf'pip install "prunepass\[{extra}\]"'):
        get_target(target).lower(gm, [torch.ones(1, 2)])


@pytest.mark.parametrize("target", ["eager", "inductor", "openvino", "onnxruntime"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_fusions_of_a_dense_encoder(target: str, activation: str) -> None:
    program = capture_module(bert(hidden_act=activation), text(2, 9)).exported
    counts = fusion_counts(target, program)
    assert counts.attention == LAYERS
    assert counts.layer_norm == 1 + 2 * LAYERS
    assert counts.gelu == (LAYERS if activation == "gelu" else 0)
    assert counts.counts


@pytest.mark.parametrize("target", ["eager", "inductor", "openvino", "onnxruntime"])
def test_pruning_loses_no_fusion(target: str) -> None:
    plan = PrunePlan([Stage(1, "1/2"), Stage(2, "1/4")], ScorerSpec("norm"))
    dense, pruned = (
        fusion_counts(target, program)
        for program in (capture_module(bert(), text(2, 9)).exported, prune(bert(), plan, text(2, 9)).exported)
    )
    assert (pruned.attention, pruned.layer_norm, pruned.gelu) == (dense.attention, dense.layer_norm, dense.gelu)


@pytest.mark.parametrize("target", ["eager", "inductor", "openvino", "onnxruntime"])
def test_attention_written_out_is_not_counted_as_whole(target: str) -> None:
    class ByHand(nn.Module):
        def forward(self, x: Any) -> Any:
            return (x @ x.transpose(-1, -2)).tanh() @ x

    program = torch.export.export(ByHand(), (torch.randn(2, 4, 16, 8),))
    assert fusion_counts(target, program).attention == 0
