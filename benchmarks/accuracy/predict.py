"""Running a model over features, and reading its outputs as the metrics take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.features import Features, Kind
from benchmarks.accuracy.metrics import Array

__all__ = ["predict", "read_outputs"]

Outputs = Mapping[str, Any]


@torch.no_grad()
def predict(
    model: Callable[..., Outputs], features: Features, kind: Kind, tokenizer: Any, *, batch_size: int = 32
) -> list[Array]:
    """One output a row, in the order of the rows.

    Rows run in batches of about the same length, padded to the longest.

    Args:
        model: takes the tokenizer's inputs (int64 [batch, length]) by name and gives a mapping of named outputs.
    """
    order = sorted(range(len(features)), key=features.lengths.__getitem__)
    outputs: list[Any] = [None] * len(order)
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        rows = [{name: features.rows[i][name] for name in tokenizer.model_input_names} for i in at]
        inputs = dict(tokenizer.pad(rows, return_tensors="pt"))
        for i, output in zip(at, read_outputs(kind, model(**inputs), inputs["attention_mask"]), strict=True):
            outputs[i] = output
    return outputs


def read_outputs(kind: Kind, outputs: Outputs, attention_mask: Any) -> list[Array]:
    """A model's named outputs as one array for each row; see `metrics` for the shapes.

    Outputs of tokens come back without their padding (which is taken to be on the right). Embeddings are the mean of
    the last hidden state over the live tokens, brought to unit length, as all-MiniLM-L6-v2 was trained.

    Args:
        outputs: tensors or arrays, [batch, ...].
        attention_mask: [batch, length], 1 at live tokens.
    """
    mask = _array(attention_mask)
    if kind in ("classification", "regression"):
        return list(_array(outputs["logits"]))
    if kind == "embedding":
        pooled = (_array(outputs["last_hidden_state"]) * mask[:, :, None]).sum(axis=1)
        return list(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    if kind == "question-answering":
        values = np.stack([_array(outputs["start_logits"]), _array(outputs["end_logits"])], axis=-1)
    else:
        values = _array(outputs["logits"])
    return [row[: int(live)] for row, live in zip(values, mask.sum(axis=1), strict=True)]


def _array(value: Any) -> Array:
    return np.asarray(value.float() if isinstance(value, Tensor) else value, dtype=np.float32)
