"""The benchmark "training-length": its cells, its page and its picture."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.accuracy.rows import RECIPES
from benchmarks.runner import page
from benchmarks.store import Group
from benchmarks.tasks import training_length
from benchmarks.tasks.training_length import Benchmark, draw, steps
from prunepass.errors import OptionError


def group(epochs: float, seed: int, score: float, *, method: str = "both") -> Group:
    shared = {"task": "stsb", "method": method, "epochs": epochs, "seed": seed}
    rows: list[dict[str, Any]] = []
    for budget, more in (("1/2", 0.0), ("2/5", 0.1)):
        if method == "both":
            rows.append({"row": "search", "budget": budget, "spearman": score - more - 0.05})
        training = {"steps": round(180 * epochs)}
        rows.append({"row": method, "budget": budget, "spearman": score - more, "training": training})
    return Group(shared | {"dense": {"spearman": 0.9}, "validation_examples": 1500}, rows)


def test_a_line_a_length_with_predictors_alone_beside() -> None:
    found = page("training-length", [group(8, 0, 0.7), group(1, 0, 0.82), group(1, 1, 0.84)])
    assert "## stsb, `both`: spearman on 1,500 rows" in found
    assert "Dense 90.0." in found
    header = "| epochs | steps | 1/2: predictors alone | 1/2: `both` | 2/5: predictors alone | 2/5: `both` |"
    lines = found[found.index(header) :].splitlines()
    assert lines[2] == "| 1 | 180 | 78.0 ± 1.0 | 83.0 ± 1.0 | 68.0 ± 1.0 | 73.0 ± 1.0 |"
    assert lines[3] == "| 8 | 1,440 | 65.0 | 70.0 | 55.0 | 60.0 |"


def test_a_panel_a_method(tmp_path: Path) -> None:
    groups = [group(1, 0, 0.8), group(2, 0, 0.85), group(1, 0, 0.8, method="sdtp")]
    draw(groups, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert "stsb, both" in drawn
    assert "stsb, sdtp" in drawn
    assert steps(groups[1:2]) == 360


def test_a_method_that_there_is_not_is_named_before_anything_is_trained() -> None:
    with pytest.raises(OptionError, match="no method 'free'; there are"):
        list(Benchmark(methods=("free",)).cells())


def test_a_cell_trains_so_many_epochs_of_the_tasks_own_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    class Run:
        def __init__(self, task: Any, seed: int, *, validates: bool) -> None:
            self.task, self.dense_score = task, {"spearman": 0.9}
            self.test = type("Test", (), {"examples": [{}] * 7})
            asked["run"] = (task.name, seed, validates)

        def trained(self, method: str, recipe: Any) -> list[dict[str, Any]]:
            asked["trained"] = (method, recipe)
            return []

    monkeypatch.setattr(training_length, "Run", Run)
    monkeypatch.setattr(training_length, "model_folder", lambda task: tmp_path)
    *_, cell = Benchmark(methods=("sdtp",), epochs=(2.0, 5.0)).cells()
    shared, _ = cell.measure(())
    assert cell.key == {"task": "stsb", "method": "sdtp", "epochs": 5.0, "seed": 0}
    assert shared["validation_examples"] == 7
    assert asked == {"run": ("stsb", 0, True), "trained": ("sdtp", replace(RECIPES["stsb"], epochs=5.0))}
