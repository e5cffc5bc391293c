"""The loop that one writes oneself: texts sorted by length, batches of so many, one call after the other in OpenVINO.

A script; it imports nothing of prunepass. See `benchmarks.embedding.timed` for its arguments and what it prints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import timed


class Loop:
    """An exported folder, compiled; called with texts it gives their vectors [n, d].

    Args:
        settings: ``batch``, and ``hint``, OpenVINO's performance hint.
        config: of OpenVINO besides.
    """

    def __init__(self, folder: str, max_length: int, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id("[PAD]"))
        config = {**config, "PERFORMANCE_HINT": settings["hint"]}
        self._compiled = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", config)
        self._names = [port.get_any_name() for port in self._compiled.inputs]
        self._request = self._compiled.create_infer_request()
        self._batch = settings["batch"]

    def __call__(self, texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(order), self._batch):
            numbers = order[start : start + self._batch]
            rows = self._tokenizer.encode_batch([texts[i] for i in numbers])
            made = {
                "input_ids": np.array([row.ids for row in rows], np.int64),
                "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
                "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
            }
            self._request.infer({name: made[name] for name in self._names})
            vectors = self._request.get_output_tensor(0).data.astype(np.float32).reshape(len(rows), -1)
            for i, vector in zip(numbers, vectors, strict=True):
                found[i] = vector
        return np.stack(found)


if __name__ == "__main__":
    timed.main(Loop)
