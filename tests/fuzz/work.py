"""What a worker process runs."""

from __future__ import annotations

import logging
import warnings
from collections import Counter

import torch

from fuzz.cases import draw
from fuzz.checks import run

__all__ = ["check"]


def check(seeds: list[int], ways: dict[str, int] | None) -> tuple[Counter[str], Counter[str], list[str]]:
    """Run the episodes of some seeds: calls by verdict, by way, and notes."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    by_way: Counter[str] = Counter()
    notes: list[str] = []
    for seed in seeds:
        episode = draw(seed, ways)
        outcome = run(episode)
        counts += outcome.counts
        by_way[episode.way] += sum(outcome.counts.values())
        notes += outcome.notes
    return counts, by_way, notes
