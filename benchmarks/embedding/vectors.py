"""Mean-pooled vectors of texts, as a PyTorch model gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def vectors(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """[N, D]: means over live tokens, normalised."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"][..., None]
            rows.append(normalize((model(**batch)[0] * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)
