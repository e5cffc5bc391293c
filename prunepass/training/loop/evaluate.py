"""Figures of several models on one set of rows, with intervals: how well the dense model does, the pruned one, and the
dense one on texts that are cut until they cost as much as pruned ones.

Intervals are percentile bootstrap intervals over rows at 95 %. One draw of rows serves all models, so that the interval
of a difference is that of paired data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.plan import Protect
from prunepass.training.data.distances import live, mean_pooled
from prunepass.training.data.heads import Batch, Head, Kind
from prunepass.training.data.metrics import IGNORED
from prunepass.training.data.rows import Rows
from prunepass.training.methods.graphs import let_go

__all__ = [
    "METHOD",
    "WHOLE_TEXT",
    "Compared",
    "Evaluation",
    "Interval",
    "Scored",
    "equal_length",
    "intervals",
    "longest_of",
]

#: how the intervals come about, for people and files
METHOD = "95 % percentile bootstrap over rows, paired for differences"
#: heads that read a text as a whole, so that one that is cut still has an answer
WHOLE_TEXT = (Kind.CLASSIFICATION, Kind.MULTI_LABEL, Kind.REGRESSION, Kind.EMBEDDING)

Array = NDArray[Any]
Interval = tuple[float, float]

_DRAWS = 1000
_DRAWS_BY_TOKEN = 200  # metrics of entities are counted in Python
_TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Scored:
    """One model on all rows.

    Attributes:
        figures: means and metrics over the rows.
        predictions, labels: what the head's metrics are taken of, an array or several with N rows each; None without
            labels.
        distances: float64 [N], of each row from the dense model's answer, where there are no labels.
        name: of the mean of ``distances``.
    """

    figures: dict[str, float]
    rows: int
    predictions: Any
    labels: Any
    distances: Array | None
    name: str

    def draw(self, head: Head, rows: Array) -> dict[str, float]:
        """Figures on a draw of rows, int [N]; without the loss on labels, which is not kept by row."""
        if self.distances is not None:
            return {self.name: float(self.distances[rows].mean())}
        return _metrics(head, _taken(self.predictions, rows), _taken(self.labels, rows))


@dataclass(frozen=True)
class Evaluation:
    """Runs models over rows.

    Args:
        head: what is compared.
        collator: of rows to padded batches.
        size: rows in a batch.
        device: that models are on.
        precision: makes the context that models run in.
        by_labels: whether labels count, where rows have them; else the distance from the dense model's answers.
        name: of the loss, or of that distance.
    """

    head: Head
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
    size: int
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]
    by_labels: bool = True
    name: str = "loss"

    @torch.no_grad()
    def of(self, model: Callable[..., Any], rows: Rows, dense: nn.Module, whole: Rows) -> Scored:
        """``model`` on ``rows``, beside ``dense`` on the same rows as they are when ``whole``."""
        losses = np.zeros(len(rows))
        predictions: list[Any] = [None] * len(rows)
        labels: list[Any] = [None] * len(rows)
        labelled = True
        for places in self._batches(whole):
            batch = self._batch(rows, places)
            labelled = self.by_labels and self.head.has_labels(batch)
            outputs = self._run(model, batch)
            if not labelled:
                losses[places] = self._distances(outputs, batch, dense, self._batch(whole, places))
                continue
            losses[places] = float(self.head.task_loss(outputs, batch))
            for place, got, wanted in zip(places, *self._compared(outputs, batch), strict=True):
                predictions[place], labels[place] = got, wanted
        if not labelled:
            return Scored({self.name: float(losses.mean())}, len(rows), None, None, losses, self.name)
        got, wanted = _stacked(predictions), _stacked(labels)
        figures = {self.name: float(losses.mean()), **_metrics(self.head, got, wanted)}
        return Scored(figures, len(rows), got, wanted, None, self.name)

    def _batches(self, rows: Rows) -> list[list[int]]:
        """Rows of like length together."""
        order = sorted(range(len(rows)), key=rows.lengths.__getitem__)
        return [order[i : i + self.size] for i in range(0, len(order), self.size)]

    def _batch(self, rows: Rows, places: Sequence[int]) -> dict[str, Tensor]:
        made = self.collator([dict(rows[i]) for i in places])
        return {name: value.to(self.device) for name, value in made.items()}

    def _run(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        with self.precision():
            outputs = model(**self.head.model_inputs(batch))
        if isinstance(model, nn.Module):
            let_go(model)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}

    def _distances(self, outputs: Mapping[str, Tensor], batch: Batch, dense: nn.Module, whole: Batch) -> Array:
        """Of each row from the dense model's answer, which is of the whole text."""
        answers = self._run(dense, whole)
        if self.head.kind == Kind.EMBEDDING and not self.head.makes_tokens:  # texts of two lengths, by their vectors
            one, other = (_pooled(o, b) for o, b in ((outputs, batch), (answers, whole)))
            ones = torch.ones(len(one["last_hidden_state"]), 1, dtype=torch.int64, device=self.device)
            distances = self.head.divergence(one, other, {"input_ids": ones, "attention_mask": ones})
        else:
            distances = self.head.divergence(outputs, answers, batch)
        return np.asarray(distances.double().clamp(min=0).cpu())  # rounding may leave less than nothing

    def _compared(self, outputs: Mapping[str, Tensor], batch: Batch) -> tuple[list[Any], list[Any]]:
        values = tuple(outputs.values())
        wanted = tuple(batch[key] for key in self.head.label_keys)
        got = self.head.compress(values[0] if len(values) == 1 else values, wanted[0] if len(wanted) == 1 else wanted)
        return _by_row(got), _by_row(wanted[0] if len(wanted) == 1 else wanted)


@dataclass(frozen=True)
class Compared:
    """The models whose figures an outcome holds, and the rows.

    Attributes:
        teacher: whose answers those without labels are compared with.
        cut: the same rows, cut to as much as the pruned model costs.
    """

    evaluation: Evaluation
    rows: Rows
    teacher: nn.Module
    dense: nn.Module
    pruned: nn.Module
    cut: Rows | None

    def figures(self) -> dict[str, Any]:
        """Of all, with intervals, as `prunepass.training.loop.outcome.Outcome` takes them."""
        of = self.evaluation.of
        scored = {"dense": of(self.dense, self.rows, self.teacher, self.rows)}
        if self.cut is not None:
            scored["truncated"] = of(self.dense, self.cut, self.teacher, self.rows)
        scored["pruned"] = of(self.pruned, self.rows, self.teacher, self.rows)
        return {name: one.figures for name, one in scored.items()} | {
            "truncated_to": None if self.cut is None else self.cut.max_length,
            "rows": len(self.rows),
            "intervals": intervals(self.evaluation.head, scored),
        }


def equal_length(costs: CostModel, lengths: Sequence[int], share: float, protect: Protect) -> int | None:
    """The most tokens that texts may be cut to, for the dense model on them to cost ``share`` of what it does whole.

    Returns:
        None where even two tokens a text cost more.
    """
    found = longest_of(lambda n: PlanCosts.over(costs, [n], protect).dense, lengths, share)
    return found if found > 1 else None


def longest_of(cost: Callable[[int], float], lengths: Sequence[int], share: float) -> int:
    """The most tokens that texts of ``lengths`` may be cut to, to cost at most ``share`` of what they do whole.

    Args:
        cost: of one text of so many tokens; it never falls.

    Returns:
        0 where even one token a text costs more.
    """
    rows, known = Counter(lengths), cache(cost)
    allowed = share * sum(count * known(n) for n, count in rows.items())
    low, high = 0, max(rows)
    while low < high:
        middle = (low + high + 1) // 2
        total = sum(count * known(min(n, middle)) for n, count in rows.items())
        low, high = (middle, high) if total <= allowed else (low, middle - 1)
    return low


def intervals(head: Head, scored: Mapping[str, Scored], base: str = "dense") -> dict[str, dict[str, Interval]]:
    """The interval of each figure of each model, and of its difference from ``base`` under ``"<name> - <base>"``.

    Models must have been scored on the same rows.
    """
    count = scored[base].rows
    draws = _DRAWS if head.kind in WHOLE_TEXT or scored[base].distances is not None else _DRAWS_BY_TOKEN
    chance = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(draws):
        rows = chance.integers(0, count, count)
        drawn = {name: one.draw(head, rows) for name, one in scored.items()}
        for name, figures in drawn.items():
            for figure, value in figures.items():
                found.setdefault(name, {}).setdefault(figure, []).append(value)
                if name != base:
                    difference = value - drawn[base][figure]
                    found.setdefault(f"{name} - {base}", {}).setdefault(figure, []).append(difference)
    return {name: {f: _bounds(values) for f, values in figures.items()} for name, figures in found.items()}


def _bounds(values: Sequence[float]) -> Interval:
    finite = [v for v in values if np.isfinite(v)]
    if not finite:
        return float("nan"), float("nan")
    low, high = np.percentile(finite, _TAILS)
    return float(low), float(high)


def _metrics(head: Head, predictions: Any, labels: Any) -> dict[str, float]:
    with np.errstate(all="ignore"):
        return head.metrics(SimpleNamespace(predictions=predictions, label_ids=labels))


def _pooled(outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    return {"last_hidden_state": mean_pooled(outputs["last_hidden_state"], live(batch)).unsqueeze(1)}


def _by_row(values: Any) -> list[Any]:
    """Each row's part of an array [B, ...], or of several."""
    if isinstance(values, tuple):
        return list(zip(*(_by_row(v) for v in values), strict=True))
    wide = values.float() if values.is_floating_point() else values  # numpy knows no bfloat16
    return list(np.asarray(wide.cpu()))


def _stacked(rows: Sequence[Any]) -> Any:
    """Rows to an array; those of several widths are filled up with labels that do not count."""
    if isinstance(rows[0], tuple):
        return tuple(_stacked(part) for part in zip(*rows, strict=True))
    if np.ndim(rows[0]) == 0 or len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    filled = np.full((len(rows), max(len(row) for row in rows)), IGNORED, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def _taken(values: Any, rows: Array) -> Any:
    return tuple(v[rows] for v in values) if isinstance(values, tuple) else values[rows]
