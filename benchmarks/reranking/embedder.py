"""`prunepass.bulk.Embedder` on an exported reranker. See `benchmarks.reranking.timed`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prunepass.bulk import Embedder

sys.path.insert(0, str(Path(__file__).parent))
import timed


def make(folder: str, max_length: int, batch: int, config: dict[str, Any]) -> timed.Score:
    """The embedder makes its own batches, of equal numbers of tokens."""
    config = dict(config)
    precision, cpus = config.pop("INFERENCE_PRECISION_HINT", None), int(config.pop("INFERENCE_NUM_THREADS"))
    return Embedder(folder, cpus=cpus, max_length=max_length, truncate=True, precision=precision, config=config or None)


if __name__ == "__main__":
    timed.main(make)
