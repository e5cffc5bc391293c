"""The benchmark "int8-agreement": what two models have in common, which texts, and the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from runtimes import bert, text

import prunepass
from benchmarks.runner import page
from benchmarks.store import Group
from benchmarks.tasks.int8_agreement import FORMATS, Benchmark, compared, opened, texts_of
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError


def test_tokens_in_common_are_those_that_are_zero_in_neither() -> None:
    one = torch.randn(1, 8, 4)
    other = one.clone()
    one[:, [4, 5, 6, 7]] = 0
    other[:, [3, 5, 6, 7]] = 0
    found = compared([(one, other), (one, one)])
    assert found["same_tokens"] == (3 / 4 + 1) / 2
    apart = float(torch.cosine_similarity(one.mean(1), other.mean(1)))
    assert found["least"] == pytest.approx(apart, abs=1e-4)
    assert found["cosine"] == pytest.approx((apart + 1) / 2, abs=1e-4)


def test_no_text_is_measured_that_was_calibrated_on() -> None:
    measured, others = texts_of(8, 4)
    assert (len(measured), len(others)) == (8, 4)
    assert len({*measured, *others}) == 12
    assert texts_of(8, 4) == (measured, others)


@pytest.mark.parametrize("runtime", FORMATS)
def test_a_folder_runs_by_its_own_runtime(runtime: str, tmp_path: Path) -> None:
    to, package = FORMATS[runtime]
    pytest.importorskip(package)
    model, plan = bert(num_layers=2), PrunePlan([Stage(1, 0.5)], "norm", restore="zeros")
    x, example = (inputs | {"token_type_ids": 0 * inputs["input_ids"]} for inputs in (text(1, 12), text(2, 9)))
    wanted = prunepass.prune(model, plan, example)(**x).last_hidden_state
    found = opened(prunepass.export(model, plan, tmp_path / "out", to=to))(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert compared([(wanted.detach(), found)]) == {"same_tokens": 1, "cosine": 1, "least": 1}


def test_a_runtime_that_there_is_not_is_named() -> None:
    with pytest.raises(OptionError, match="no runtime 'other'; there are OpenVINO, ONNX Runtime"):
        list(Benchmark(runtimes=("other",)).cells())


def test_the_page_has_a_line_a_runtime_and_model() -> None:
    shared = {"runtime": "OpenVINO", "texts": 64, "max_length": 512, "tokens": 301.5, "calibration": 32}
    rows = [
        {"way": "unpruned", "cosine": 0.999, "least": 0.99},
        {"way": "zeros", "same_tokens": 0.98515, "cosine": 0.99444, "least": 0.97},
    ]
    found = page("int8-agreement", [Group(shared, rows)])
    assert "## 64 texts of 301.5 tokens in the mean, cut at 512" in found
    assert "OpenVINO's ranges are from 32 other texts." in found
    assert "| OpenVINO | nothing pruned |  | 0.999 | 0.990 |" in found
    assert '| OpenVINO | pruned, restore="zeros" | 98.5 % | 0.994 | 0.970 |' in found
