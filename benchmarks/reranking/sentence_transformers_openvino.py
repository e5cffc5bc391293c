"""sentence-transformers' cross-encoder with its OpenVINO backend on an exported reranker; it sorts pairs by length.

For an environment with sentence-transformers and optimum-intel. See `benchmarks.reranking.timed`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder

sys.path.insert(0, str(Path(__file__).parent))
import timed


def make(folder: str, max_length: int, batch: int, config: dict[str, Any]) -> timed.Score:
    """A folder as sentence-transformers loads it."""
    files = {"file_name": "openvino_model.xml", "ov_config": {**config, "PERFORMANCE_HINT": "LATENCY"}}
    model = CrossEncoder(folder, backend="openvino", device="cpu", model_kwargs=files, max_length=max_length)
    return lambda pairs: model.predict(pairs, batch_size=batch, show_progress_bar=False)


if __name__ == "__main__":
    timed.main(make)
