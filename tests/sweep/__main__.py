"""``PYTHONPATH=tests python -m sweep [TYPES]``: all causal types, each in a process of its own with a limit of time."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")


def _work(model_type: str, generate: bool, results: Any) -> None:
    import logging

    import torch

    from sweep.checks import check

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    results.put(check(model_type, generate=generate).to_dict())


def _one(context: Any, model_type: str, generate: bool, limit: float) -> dict[str, str]:
    """The findings of a child; one that crashes or takes too long says so."""
    results = context.Queue()
    child = context.Process(target=_work, args=(model_type, generate, results))
    child.start()
    end = time.monotonic() + limit
    found: dict[str, str] | None = None
    while found is None and time.monotonic() < end:
        if not results.empty():
            found = results.get()
        elif not child.is_alive() and results.empty():
            time.sleep(0.2)
            if results.empty():
                break
        time.sleep(0.05)
    if child.is_alive() and found is None:
        child.kill()
        outcome, note = "late", f"more than {limit:.0f} seconds"
    else:
        outcome, note = "raw", f"the process ended with code {child.exitcode}"
    child.join()
    return found or {"model_type": model_type, "prune": outcome, "prune_note": note, "generate": outcome}


def main() -> int:
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all causal ones where left out")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one type")
    parser.add_argument("--no-generate", action="store_true", help="check prune() alone")
    parser.add_argument(
        "--results", type=Path, default=Path("build/sweep.jsonl"), help="one line a type; types in it are done"
    )
    parser.add_argument("--table", type=Path, help="page to write the table into, between its markers")
    options = parser.parse_args()

    import transformers  # noqa: F401  # children are forked from here and need not load it

    from sweep.models import causal_types
    from sweep.table import read, write

    context = multiprocessing.get_context("fork")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.results)
    for model_type in options.types or causal_types():
        if model_type in done and not options.types:
            continue
        start = time.monotonic()
        found = _one(context, model_type, not options.no_generate, options.limit)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        seconds = time.monotonic() - start
        print(
            f"{model_type}: {found['prune']} ({found['prune_note'][:150]}); generate() {found['generate']} "
            f"({found.get('generate_note', '')[:150]}) {seconds:.0f} s",
            flush=True,
        )
    rows = read(options.results)
    if options.table:
        write(options.table, rows)
    bad = [name for name, row in rows.items() if {row["prune"], row["generate"]} & {"wrong", "raw"}]
    print(f"{len(rows)} types; wrong or raw: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
