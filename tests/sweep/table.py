"""What was found, as a table in a page of the documentation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each type, by its name."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["model_type"]: line for line in lines}


def write(page: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table of ``rows`` between the page's markers."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a type, those that could not be built or traced left out and counted."""
    lines = ["| model type | `prune()` | `generate()` |", "|---|---|---|"]
    out = Counter(row["prune"] for row in rows.values())
    for name, row in sorted(rows.items()):
        if row["prune"] in ("unbuilt", "dense"):
            continue
        lines.append(f"| {name} | {_cell(row, 'prune')} | {_cell(row, 'generate')} |")
    left_out = out["unbuilt"] + out["dense"]
    lines += ["", f"{len(rows)} types; {left_out} of them could not be built small or do not run by `input_ids` alone."]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], way: str) -> str:
    outcome, note = row[way], row.get(f"{way}_note", "").replace("|", "\\|").replace("<", "&lt;")
    note = re.sub(r"\S*/site-packages/", "", note)  # where packages are on this machine
    if outcome == "right":
        return f"right, {note.partition(':')[0]}" if note.startswith("from layer") else "right"
    return f"{outcome}: {note}" if note else str(outcome)
