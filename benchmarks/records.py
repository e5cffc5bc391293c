"""What all benchmarks do with their records: JSON files that are there whole or not at all, and tables of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["table", "write"]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of cells that are text already."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def write(file: Path, record: Mapping[str, Any]) -> Path:
    """Keep a record; gives its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return part.replace(file)
