"""Figures with intervals, and texts cut until they cost what pruned ones do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import collate, rows
from torch import nn

import zoo
from harness import captured
from prunepass import Protect
from prunepass.cost.blocks import BlockCosts
from prunepass.cost.plans import PlanCosts
from prunepass.training.data.features import Features
from prunepass.training.data.heads import head_of
from prunepass.training.loop.evaluate import Evaluation, Scored, equal_length, intervals


class Answers(nn.Module):
    """Gives each row the logits that stand beside its first token."""

    def __init__(self, table: dict[int, list[float]]) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> dict[str, torch.Tensor]:
        return {"logits": torch.tensor([self.table[int(i)] for i in input_ids[:, 0]])}


def evaluation(head: Any, **options: Any) -> Evaluation:
    return Evaluation(head, collate, 3, torch.device("cpu"), nullcontext, **options)


def features(wrong: int, count: int = 40) -> tuple[Features, Answers]:
    """Rows of one class, of which a model gets ``wrong`` wrong, spread over all lengths."""
    made = rows(count)
    table = {}
    for i, row in enumerate(made):
        row["input_ids"][0], row["labels"] = i, 1
        table[i] = [1.0, 0.0] if i < wrong else [0.0, 1.0]
    return Features(tuple(made), 64), Answers(table)


def test_figures_are_of_each_row_once_whatever_the_batches() -> None:
    head = head_of(zoo.tiny("bert", "sequence"))
    data, model = features(wrong=10)
    found = evaluation(head).of(model, data, model, data)
    assert found.figures["accuracy"] == 0.75
    assert (found.predictions.argmax(-1) == 0).nonzero()[0].tolist() == list(range(10)), "in the order of the rows"


def test_intervals_hold_what_they_should_and_differences_are_paired() -> None:
    head = head_of(zoo.tiny("bert", "sequence"))
    data, model = features(wrong=10, count=400)
    other = Answers(dict(model.table) | {399: [1.0, 0.0]})  # wrong in one row more
    measured = evaluation(head)
    scored = {name: measured.of(m, data, model, data) for name, m in {"dense": model, "pruned": other}.items()}
    found = intervals(head, scored)
    low, high = found["dense"]["accuracy"]
    spread = 1.96 * (0.975 * 0.025 / 400) ** 0.5
    assert low == pytest.approx(0.975 - spread, abs=0.005)
    assert high == pytest.approx(0.975 + spread, abs=0.005)
    low, high = found["pruned - dense"]["accuracy"]
    assert -0.01 <= low < high <= 0.0, "a single row differs: far less than each of the two varies"
    assert "loss" not in found["dense"]


def test_without_labels_distances_from_the_dense_model_are_the_figure() -> None:
    head = head_of(zoo.tiny("bert", "sequence"))
    data, model = features(wrong=0, count=12)
    other = Answers(dict(model.table) | {3: [1.0, 0.0]})
    measured = evaluation(head, by_labels=False, name="divergence")
    same, found = (measured.of(m, data, model, data) for m in (model, other))
    assert same.figures == {"divergence": 0.0}
    assert found.distances is not None
    assert found.distances.nonzero()[0].tolist() == [3]
    low, high = intervals(head, {"dense": same, "pruned": found})["pruned"]["divergence"]
    assert 0 <= low < found.figures["divergence"] < high


@pytest.mark.parametrize("head", ["base", "token", "question", "masked"])
def test_any_head_beside_its_cut_texts(head: str) -> None:
    model = zoo.tiny("bert", head, dtype=torch.float32).eval()
    data = Features(tuple(rows(10, head)), 64)
    cut = Features(tuple({k: v[:6] if isinstance(v, list) else v for k, v in row.items()} for row in data.rows), 6)
    found = evaluation(head_of(model)).of(model, data, model, data)
    assert all(np.isfinite(v) for v in found.figures.values())
    assert set(intervals(head_of(model), {"dense": found})["dense"]) >= set(found.figures) - {"loss"}
    if head == "base":
        assert found.figures["loss"] == pytest.approx(0, abs=1e-6)
        assert evaluation(head_of(model)).of(model, cut, model, data).figures["loss"] > 1e-3


def test_texts_are_cut_to_equal_cost() -> None:
    costs, lengths = BlockCosts.of(captured("bert", "sequence"), scorer="norm"), [10, 20, 40, 60]
    whole = PlanCosts.over(costs, lengths).dense
    found = equal_length(costs, lengths, 0.5, Protect())
    assert found is not None
    cost = [PlanCosts.over(costs, [min(n, most) for n in lengths]).dense for most in (found, found + 1)]
    assert cost[0] <= 0.5 * whole < cost[1]
    assert equal_length(costs, lengths, 1e-6, Protect()) is None


def test_rows_of_several_widths_are_drawn_together() -> None:
    labels = np.array([[0, 1, -100], [1, 1, 1]])
    scored = Scored({}, 2, np.array([[0, 1, 0], [0, 1, 1]]), labels, None, "loss")
    head = head_of(zoo.tiny("bert", "token"))
    assert scored.draw(head, np.array([0, 0]))["accuracy"] == 1.0
    assert scored.draw(head, np.array([1, 1]))["accuracy"] == pytest.approx(2 / 3)
