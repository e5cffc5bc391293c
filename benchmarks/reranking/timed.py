"""What the programs beside it share: read queries, then time one each time they are told to.

``PROGRAM FOLDER QUERIES --max-length N --batch B --config JSON`` loads the model, reads the queries (JSON lines with
``query`` and ``passages``) and writes ``ready``. For each line of its input, the number of a query, it scores that
query's passages and writes ``{"seconds": ..., "scores": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]

Score = Callable[[list[tuple[str, str]]], Any]


def main(make: Callable[[str, int, int, dict[str, Any]], Score]) -> None:
    """Run a program.

    Args:
        make: from folder, longest pair in tokens, batch and OpenVINO's config to a function of pairs that gives one
            number for each.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("queries", type=Path)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--config", type=json.loads, default={})
    given = parser.parse_args()
    queries = [json.loads(line) for line in given.queries.read_text(encoding="utf-8").splitlines()]
    score = make(given.folder, given.max_length, given.batch, given.config)
    print("ready", flush=True)
    for line in sys.stdin:
        query = queries[int(line)]
        pairs = [(query["query"], passage) for passage in query["passages"]]
        began = time.perf_counter()
        scores = score(pairs)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "scores": [float(one) for one in scores]}), flush=True)
