"""sentence-transformers' OpenVINO backend on an exported folder; it sorts the texts by length itself.

A script for an environment with sentence-transformers and optimum-intel, which need not be that of prunepass. See
`benchmarks.embedding.timed` for its arguments and what it prints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parent))
import timed


class Encoder:
    """A folder as sentence-transformers loads it; called with texts it gives their vectors [n, d].

    Args:
        settings: ``batch``, and ``hint``, OpenVINO's performance hint.
        config: of OpenVINO besides.
    """

    def __init__(self, folder: str, max_length: int, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        config = {**config, "PERFORMANCE_HINT": settings["hint"]}
        files = {"file_name": "openvino_model.xml", "ov_config": config}
        self._model = SentenceTransformer(folder, backend="openvino", device="cpu", model_kwargs=files)
        self._model.max_seq_length = max_length
        self._batch = settings["batch"]

    def __call__(self, texts: Sequence[str]) -> Any:
        return self._model.encode(
            list(texts), batch_size=self._batch, normalize_embeddings=True, show_progress_bar=False
        )


if __name__ == "__main__":
    timed.main(Encoder)
