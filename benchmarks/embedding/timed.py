"""What the scripts beside it share: arguments, the best settings by trial, and running all texts.

``SCRIPT FOLDER TEXTS VECTORS --max-length N --settings JSON --config JSON`` runs the texts (JSON lines with ``text``)
and writes their vectors [n, d] as .npy. ``SCRIPT FOLDER TEXTS --max-length N --try JSON --config JSON`` runs them by
each of several settings and prints the fastest, and the seconds of each, as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]


def main(make: Callable[[str, int, dict[str, Any], dict[str, Any]], Callable[[list[str]], Any]]) -> None:
    """Run a script.

    Args:
        make: from folder, longest text in tokens, settings and OpenVINO's config to a function of texts.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("texts", type=Path)
    parser.add_argument("vectors", type=Path, nargs="?")
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--settings", type=json.loads)
    parser.add_argument("--try", dest="tried", type=json.loads)
    parser.add_argument("--config", type=json.loads, default={})
    given = parser.parse_args()
    texts = [json.loads(line)["text"] for line in given.texts.read_text(encoding="utf-8").splitlines()]
    if given.tried is None:
        np.save(given.vectors, make(given.folder, given.max_length, given.settings, given.config)(texts))
        return
    ways = [make(given.folder, given.max_length, settings, given.config) for settings in given.tried]
    for way in ways:  # the first time each shape is prepared
        way(texts)
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(2):
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way(texts)
            taken.append(time.perf_counter() - began)
    best = min(range(len(ways)), key=lambda i: min(seconds[i]))
    found = [[settings, round(min(taken), 4)] for settings, taken in zip(given.tried, seconds, strict=True)]
    print(json.dumps({"best": given.tried[best], "tried": found}))
