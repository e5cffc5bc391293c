"""The short tables of docs/figures.md, taken out of the long ones under docs/figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

FIGURES = Path(__file__).parent.parent / "figures"
Table = list[list[str]]
_BUDGET = "2/5"
#: rows of the accuracy tables, and what a reader of one table needs as their names
_ROWS = {
    "dense": "dense",
    "text cut short": "text cut short",
    "trained predictors, frozen model": "predictors, model unchanged",
    "both together": "`both`",
    "SDTP": "`sdtp`",
    "ToP": "`top`",
}
#: kinds of runtime and precision, from the names of sections, and their columns' names
_COLUMNS = {
    "openvino-f32": "OpenVINO f32",
    "openvino-bf16": "OpenVINO bf16",
    "openvino-int8": "OpenVINO int8",
    "onnxruntime-f32": "ONNX Runtime f32",
    "onnxruntime-int8": "ONNX Runtime int8",
    "inductor-f32": "Inductor f32",
    "inductor-bf16": "Inductor bf16",
}


def long_texts() -> str:
    """The accuracy on 20 Newsgroups by method and budget."""
    return _markdown(dict(sections("accuracy.md"))["20newsgroups"])


def all_tasks() -> str:
    """Each task at one budget: a row a task, a column a method."""
    rows = [["task", *_ROWS.values()]]
    for name, table in sections("accuracy.md"):
        cells = {line[0]: line for line in table[1:]}
        if "text cut short" not in cells or _BUDGET not in table[0] or "dense" not in cells:
            continue
        at = table[0].index(_BUDGET)
        rows.append([name, *(cells[way][1 if way == "dense" else at] if way in cells else "" for way in _ROWS)])
    return _markdown(rows)


def times() -> str:
    """How many times as fast, and in brackets the ideal: a row a model, shape and budget, a column a runtime."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, table in sections("latency.md"):
        found = re.fullmatch(r"([\w-]+), ([\w-]+), dynamic shapes", name)
        if not found or found[2] not in _COLUMNS:
            continue
        at = {title: i for i, title in enumerate(table[0])}
        for line in table[1:]:
            key = f"{found[1]} {line[0]}", line[at["budget"]]
            speed, ideal = (line[at[title]].rstrip("x") for title in ("speed-up", "ideal speed-up"))
            cells.setdefault(key, {})[found[2]] = f"{speed} ({ideal})"
    body = [[f"{shape}, {budget}", *(row.get(kind, "") for kind in _COLUMNS)] for (shape, budget), row in cells.items()]
    return _markdown([["tokens x rows, FLOPs", *_COLUMNS.values()], *body])


def int8() -> str:
    """int8 beside float32: a row a runtime and plan."""
    return _markdown(next(table for _, table in sections("int8-agreement.md")))


def search() -> str:
    """What `make demo` measures: a row a way of embedding."""
    return _markdown(next(table for _, table in sections("demo.md")))


def agreement() -> str:
    """On stories, with the full model's greedy continuation: a row a way to choose tokens, a column a budget."""
    tables = dict(sections("decoder.md"))
    table = next(t for name, t in tables.items() if name.startswith("stories260K: Agreement"))
    return _markdown([row for row in table if not row[0].startswith("from ")])


def recall() -> str:
    """Right answers after prompts of 128 tokens, the mean over depths: a row a way, a column a kind of question."""
    kinds: dict[str, dict[str, str]] = {}
    for name, table in sections("decoder-recall.md"):
        if "question" in name:
            lines = [row for row in table[1:] if row[0] == "128"]
            if not lines:
                continue  # a model that was asked at other lengths
            kinds[name.partition(": ")[2]] = {row[1]: f"{mean(map(float, row[2:])):.0f}" for row in lines}
    ways = list(next(iter(kinds.values())))
    return _markdown([["", *kinds], *([way, *(cells.get(way, "") for cells in kinds.values())] for way in ways)])


def generation_times() -> str:
    """The first token, the tokens after it, and the cache, dense and pruned."""
    return _markdown(next(table for _, table in sections("decoder-speed.md")))


def sections(page: str) -> Iterator[tuple[str, Table]]:
    """The headings of a page, those of the third level behind their second, with the first table under each."""
    above = ""
    text = (FIGURES / page).read_text(encoding="utf-8")
    for part in re.split(r"^(?=##+ )", text, flags=re.MULTILINE)[1:]:
        heading = part.splitlines()[0]
        title = heading.lstrip("#").strip()
        above = title if heading.startswith("## ") else above
        table = re.search(r"(?:^\|.*\n?)+", part, re.MULTILINE)
        if table:
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[0].splitlines()]
            yield (
                title if title == above else f"{above}: {title}",
                [row for row in rows if set("".join(row)) - set("-: ")],
            )


def _markdown(rows: Table) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
