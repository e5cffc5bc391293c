"""Folders of tiny models to run texts through, and what `prune` gives for the same texts, one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import prunepass
from prunepass import PrunePlan, Stage
from vocabulary import WORDS, save_model, tiny_tokenizer

Array = NDArray[np.float32]
PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], scorer="norm", restore="mean")
LABELS = ("bad", "fair", "good")


def texts(count: int, seed: int = 0, most: int = 20) -> list[str]:
    """Texts of 1 to ``most`` words, each with some letters of its own."""
    draw = random.Random(seed)
    words = [*WORDS, "abc", "xyz", "q"]
    return [" ".join(draw.choices(words, k=draw.randint(1, most))) + f" {chr(97 + i % 26)}" for i in range(count)]


_SHARED: dict[str, Path] = {}


def shared(kind: str, factory: pytest.TempPathFactory) -> Path:
    """An "encoder" or a "classifier" that several files look at; none changes it."""
    if kind not in _SHARED:
        _SHARED[kind] = {"encoder": encoder, "classifier": classifier}[kind](factory.mktemp(kind))
    return _SHARED[kind]


def encoder(folder: Path, to: Any = "openvino", **options: Any) -> Path:
    """An exported encoder that pools by the mean."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(_source(folder, "base")).eval()
    given = {"tokenizer": tiny_tokenizer(), "pooled": True, "pooling": "mean"} | options
    return prunepass.export(model, PLAN, folder / "out", to=to, **given)


def classifier(folder: Path, labels: tuple[str, ...] = LABELS, to: Any = "openvino", **config: Any) -> Path:
    """An exported classifier; with one label, a reranker."""
    from transformers import AutoModelForSequenceClassification

    source = _source(folder, "sequence", labels)
    model = AutoModelForSequenceClassification.from_pretrained(source, **config).eval()
    return prunepass.export(model, PLAN, folder / "out", to=to, tokenizer=tiny_tokenizer())


def _source(folder: Path, head: str, labels: tuple[str, ...] = LABELS) -> Path:
    source = folder / "model"
    source.mkdir(parents=True, exist_ok=True)
    fewer = {"num_hidden_layers": 3} if head == "base" else {}
    return save_model(source, head=head, labels=labels, **fewer)


def expected(folder: Path, given: list[Any]) -> Array:
    """Of a folder that `encoder` or `classifier` wrote: vectors or logits [n, d], each text pruned by itself."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    source = folder.parent / "model"
    classifies = "Sequence" in AutoConfig.from_pretrained(source).architectures[0]
    kind: Any = AutoModelForSequenceClassification if classifies else AutoModel
    model = kind.from_pretrained(source).eval()
    pruned, rows = None, []
    for one in given:
        parts = (one,) if isinstance(one, str) else one
        row = tiny_tokenizer()(*parts, truncation=True, max_length=64, return_tensors="pt")
        pruned = pruned or prunepass.prune(model, PLAN, dict(row))
        with torch.no_grad():
            out = pruned(**row)
        rows.append(
            out.logits[0] if classifies else torch.nn.functional.normalize(out.last_hidden_state[0].mean(0), dim=0)
        )
    return torch.stack(rows).numpy()
