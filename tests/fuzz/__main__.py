"""``PYTHONPATH=tests python -m fuzz --cases 10000``: run episodes until so many cases are checked; say what was found.

A failure is named by its seed: ``python -m fuzz --seed 1234 --cases 1`` runs it again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    from fuzz.cases import GROUP, WAYS
    from fuzz.work import check

    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="calls to check, at least")
    parser.add_argument("--seed", type=int, default=0, help="the first episode")
    parser.add_argument("--ways", help=f"comma-separated, out of: {', '.join(WAYS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--notes", type=Path, help="file for a line on every call that is wrong, raw or refused")
    options = parser.parse_args()
    ways = {w.strip(): WAYS[w.strip()] for w in options.ways.split(",")} if options.ways else None
    counts: Counter[str] = Counter()
    by_way: Counter[str] = Counter()
    start, shown, seed = time.monotonic(), time.monotonic(), options.seed
    bad = 0
    context = multiprocessing.get_context("spawn")
    # a worker's memory grows with the graphs it has captured and compiled
    with ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=6) as pool:
        running = set()
        while True:
            late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
            enough = sum(counts.values()) >= options.cases or late
            while not enough and len(running) < options.workers:
                size = 1 if options.cases <= 1 else GROUP - seed % GROUP
                running.add(pool.submit(check, list(range(seed, seed + size)), ways))
                seed += size
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                some, ways_of, notes = future.result()
                counts += some
                by_way += ways_of
                bad += some["wrong"] + some["raw"]
                for note in notes:
                    if not note.startswith("refused"):
                        print(note, flush=True)
                if options.notes:
                    with options.notes.open("a", encoding="utf-8") as file:
                        file.writelines(f"{note}\n" for note in notes)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                total = sum(counts.values())
                left = (shown - start) * max(0, options.cases - total) / max(1, total)
                print(f"{total} cases, {bad} bad, about {left / 60:.0f} minutes left", file=sys.stderr, flush=True)
    print(f"{sum(counts.values())} cases of {seed - options.seed} episodes, seeds {options.seed} to {seed - 1}")
    print("by verdict:", dict(counts.most_common()))
    print("by way:", dict(by_way.most_common()))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
