"""Records of CSV and JSON lines files, as they stand in the bytes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["record", "records"]


def records(path: str, at: int) -> Iterator[tuple[list[str], int]]:
    """Records of a CSV file from byte ``at`` on, each with the byte behind it. Empty lines are none."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**30))
    with Path(path).open("rb") as file:
        file.seek(at)
        end, number = at, 0

        def lines() -> Iterator[str]:
            nonlocal end, number
            for line in file:
                end, number = end + len(line), number + 1
                if end == len(line) and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]  # a mark of byte order
                yield line.decode("utf-8", "surrogateescape")

        reader = csv.reader(lines(), strict=True)
        try:
            for record in reader:
                if record:
                    yield record, end
        except csv.Error as e:
            raise csv.Error(f"{e} (line {number})" if at == 0 else str(e)) from None


def record(line: bytes) -> Any:
    """The value in a line; a text where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.decode("utf-8", "surrogateescape")
