"""Keeping what was measured: one JSON file a group of cells, one a corpus, and one for the first call of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.latency.cells import Group, Setup
from benchmarks.latency.compiling import Compiling
from benchmarks.records import write

__all__ = [
    "FOLDER",
    "budgets_to_measure",
    "compiling_file",
    "corpus_file",
    "file_of",
    "read",
    "read_compiling",
    "read_corpora",
    "write",
]

FOLDER = Path(__file__).parents[1] / "results" / "latency"
CORPUS, COMPILING = "corpus.*.json", "compiling.*.json"


def file_of(group: Group, setup: Setup, folder: Path) -> Path:
    """Where a group's record lies. What would make figures that don't belong together is in the name."""
    plan = f"{setup.scorer}{setup.stages}"
    sizes = f"{group.length}x{group.batch}"
    return folder / f"{group.model}.{group.target}.{group.shapes}.{sizes}.{plan}.t{setup.threads}.json"


def corpus_file(corpus: str, group: Group, setup: Setup, folder: Path) -> Path:
    """Where the record of a corpus lies."""
    plan = f"{setup.scorer}{setup.stages}"
    return folder / f"corpus.{corpus}.{group.model}.{group.target}.{group.batch}.{plan}.t{setup.threads}.json"


def compiling_file(wanted: Compiling, folder: Path) -> Path:
    """Where the record of a model's first call lies."""
    plan = f"{wanted.scorer}{wanted.stages}"
    return folder / f"compiling.{wanted.model}.{wanted.target}.{wanted.length}.{plan}.t{wanted.threads}.json"


def budgets_to_measure(file: Path, budgets: Iterable[Fraction], *, again: bool = False) -> list[Fraction]:
    """None where ``file`` has them all; else these and the ones it has, since all of a group run in the same turns.

    Args:
        again: as if there were no such file.
    """
    wanted = set(budgets)
    there = set() if again or not file.is_file() else {Fraction(cell["budget"]) for cell in _load(file)["cells"]}
    return [] if wanted <= there else sorted(wanted | there, reverse=True)


def read(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records of groups of cells."""
    for file in sorted(folder.glob("*.json")):
        if not (file.match(CORPUS) or file.match(COMPILING)):
            yield _load(file)


def read_corpora(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records of corpora."""
    for file in sorted(folder.glob(CORPUS)):
        yield _load(file)


def read_compiling(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records of first calls."""
    for file in sorted(folder.glob(COMPILING)):
        yield _load(file)


def _load(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
