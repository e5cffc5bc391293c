"""The benchmark "merge-embeddings": what is found again, rows of a tiny model, and the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from runtimes import LAYERS, POSITIONS, bert, text

from benchmarks.runner import page
from benchmarks.store import Group
from benchmarks.tasks import merge_embeddings
from benchmarks.tasks.merge_embeddings import NEAREST, Benchmark, measure, overlap
from prunepass.errors import OptionError
from prunepass.export.hub import Loaded


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A small BERT in the place of the real model, and rows of random tokens in that of Cranfield."""
    loaded = Loaded(bert(), None, POSITIONS, LAYERS)
    batches = [text(8, 20, seed) for seed in range(3)], [text(12, 9, 7)]
    for name in ("_dense", "_dense_flops"):
        getattr(merge_embeddings, name).cache_clear()
    monkeypatch.setattr(merge_embeddings, "_model", lambda: loaded)
    monkeypatch.setattr(merge_embeddings, "_collection", lambda documents, max_length: batches)
    yield loaded
    for name in ("_dense", "_dense_flops"):
        getattr(merge_embeddings, name).cache_clear()


def test_overlap_is_the_share_of_the_nearest_that_are_found_again() -> None:
    one, other = torch.randn(2, 6, 40, dtype=torch.float64).unbind()
    best, found = (np.argsort(-x.numpy(), axis=1)[:, :NEAREST] for x in (one, other))
    wanted = np.mean([len(set(a) & set(b)) / NEAREST for a, b in zip(best, found, strict=True)])
    assert 0 < wanted < 1
    assert overlap(one, other) == pytest.approx(wanted)
    assert overlap(one, 2 * one + 1) == 1
    assert overlap(one, -one) == 0


def test_a_row_a_way(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge_embeddings.STAGES, "1/2 before block 1", ((1, "1/2"),))
    shared, (drop, merge) = measure(Benchmark(max_length=20), "norm", "1/2 before block 1")
    assert (shared["queries"], drop["plan"]) == (12, "1:1/2")
    assert (drop["leave"], merge["leave"]) == ("drop", "merge")
    assert drop["flops"] < merge["flops"] < 1
    assert 0 < drop["cosine"] < merge["cosine"] < 1
    assert 0 < drop["overlap"] <= 1


def test_a_scorer_that_there_is_not_is_named_before_anything_is_measured() -> None:
    with pytest.raises(OptionError, match="no scorer 'other'; there are"):
        list(Benchmark(scorers=("norm", "other")).cells())


def test_the_page_has_a_line_a_plan() -> None:
    row: dict[str, Any] = {"cosine": 0.75, "overlap": 0.5, "flops": 0.4}
    shared = {"documents": 300, "max_length": 128, "queries": 225, "scorer": "norm", "stages": "1/2 before block 2"}
    found = page("merge-embeddings", [Group(shared, [row, row | {"cosine": 0.875}])])
    assert "## 300 documents, 225 queries, cut at 128 tokens" in found
    assert "| norm | 1/2 before block 2 | 0.750 | 0.500 | 0.400 | 0.875 | 0.500 | 0.400 |" in found
