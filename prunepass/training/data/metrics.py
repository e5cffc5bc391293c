"""Figures from predictions and labels: numpy arrays in, plain floats in [0, 1] (or [-1, 1]) out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunepass.errors import MissingExtraError

__all__ = ["IGNORED", "classification", "entities", "entity_spans", "multi_label", "regression", "spans", "tokens"]

Array = NDArray[Any]

#: the label of positions that do not count, as transformers and torch have it
IGNORED = -100


def classification(logits: Array, labels: Array) -> dict[str, float]:
    """Accuracy, and F1: of class 1 where there are two, else the mean over the classes that occur.

    Args:
        logits: [N, C].
        labels: int [N].
    """
    predicted = logits.argmax(-1)
    classes = [1] if logits.shape[-1] == 2 else sorted({*predicted.tolist(), *labels.tolist()})
    scores = [_f1((predicted == c), (labels == c)) for c in classes]
    return {"accuracy": float((predicted == labels).mean()), "f1": float(np.mean(scores))}


def multi_label(logits: Array, labels: Array) -> dict[str, float]:
    """F1 over all yes-or-no answers (micro), and the share of rows with all of them right. Both arrays are [N, C]."""
    predicted, wanted = logits > 0, labels > 0.5
    return {"f1": _f1(predicted, wanted), "accuracy": float((predicted == wanted).all(-1).mean())}


def regression(predicted: Array, wanted: Array) -> dict[str, float]:
    """Spearman's and Pearson's correlation and the mean squared error of two arrays with N numbers each.

    The correlations are nan where all numbers are the same.
    """
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "train", "Correlations of a regression") from None
    one, other = predicted.reshape(-1), wanted.reshape(-1)
    error = float(np.square(one - other).mean())
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return {"spearman": float("nan"), "pearson": float("nan"), "mse": error}
    return {
        "spearman": float(stats.spearmanr(one, other).statistic),
        "pearson": float(stats.pearsonr(one, other).statistic),
        "mse": error,
    }


def tokens(predicted: Array, labels: Array) -> dict[str, float]:
    """The share of tokens that are right. Both arrays are int [N, S]; labels of -100 do not count."""
    counts = labels != IGNORED
    return {"accuracy": float((predicted == labels)[counts].mean()) if counts.any() else float("nan")}


def entities(predicted: Array, labels: Array, names: Sequence[str]) -> dict[str, float]:
    """Token accuracy; with names such as B-PER and I-PER also precision, recall and F1 of whole entities (CoNLL-2003).

    Args:
        predicted, labels: int [N, S]; labels of -100 do not count.
        names: of the classes, by id.
    """
    figures = tokens(predicted, labels)
    if not marks_entities(names):
        return figures
    rows = [(wanted != IGNORED, got, wanted) for got, wanted in zip(predicted, labels, strict=True)]
    found = {(i, *span) for i, (on, got, _) in enumerate(rows) for span in entity_spans([names[k] for k in got[on]])}
    right = {(i, *s) for i, (on, _, wanted) in enumerate(rows) for s in entity_spans([names[k] for k in wanted[on]])}
    hits = len(found & right)
    return {
        "f1": 2 * hits / max(1, len(found) + len(right)),
        "precision": hits / max(1, len(found)),
        "recall": hits / max(1, len(right)),
        **figures,
    }


def marks_entities(names: Sequence[str]) -> bool:
    """Whether classes of tokens are BIO tags, such as B-PER and I-PER."""
    return all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def entity_spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """The entities in a row of BIO tags: type, first word, word behind the last.

    An ``I-`` whose type differs from the word's before begins an entity, as in the CoNLL evaluation.
    """
    before = ["O", *tags]
    starts = [
        i
        for i, (last, tag) in enumerate(pairwise(before))
        if tag != "O" and (tag.startswith("B-") or last == "O" or last[2:] != tag[2:])
    ]
    for start in starts:
        end = start + 1
        while end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
            end += 1
        yield tags[start][2:], start, end


def spans(predicted: tuple[Array, Array], wanted: tuple[Array, Array]) -> dict[str, float]:
    """The share of rows whose answer starts, ends, and does both where it should. All arrays are int [N]."""
    start, end = (one == other for one, other in zip(predicted, wanted, strict=True))
    return {"exact": float((start & end).mean()), "start": float(start.mean()), "end": float(end.mean())}


def _f1(predicted: Array, wanted: Array) -> float:
    hits, total = int((predicted & wanted).sum()), int(predicted.sum()) + int(wanted.sum())
    return 2 * hits / total if total else 0.0
