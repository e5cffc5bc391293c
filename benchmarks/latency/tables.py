"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from benchmarks.latency.corpus import PADDINGS
from benchmarks.records import table

__all__ = ["markdown"]

Record = Mapping[str, Any]

INTRODUCTION = """\
# How fast pruned models are

Made from the JSON files of this folder by `python -m benchmarks.latency table`; do not edit.

Models have random weights; every row is full of live tokens. Times are milliseconds a batch: the median over the
repeats, with the 95th percentile in brackets. The **ideal** is what pruning could give at most on the same runtime:
every block as fast as the dense model's own block at the pruned length, and all else as in the dense model. *Overhead*
is pruned over ideal, with the quartiles over the repeats: what scoring, selecting and putting back cost. *Reached* is
the share that the speed-up is of the FLOPs ratio. Dense, pruned and ideal were timed in turns in one process, each call
after others of its own kind."""

FIRST_CALLS = ("dense", "pruned", "pruned, filling the cache", "pruned, from the cache")
COLUMNS = (
    "tokens x rows",
    "budget",
    "dense",
    "pruned",
    "ideal",
    "FLOPs ratio",
    "speed-up",
    "ideal speed-up",
    "overhead",
    "reached",
)


COMPILING = """\
## The first call

Seconds from the first call's beginning to its end less those of the second: tracing, passes, conversion and
compilation, in a process of its own for each figure. Brackets hold CPU seconds; MiB is how far the process grew beyond
the model."""


def markdown(records: Sequence[Record], corpora: Sequence[Record] = (), compiling: Sequence[Record] = ()) -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_sections(records), *map(_of_corpus, corpora)]
    if compiling:
        parts += [COMPILING, _first_calls(compiling)]
    return "\n\n".join(parts) + "\n"


def _sections(records: Iterable[Record]) -> Iterator[str]:
    """One for each model, target, kind of shapes and plan, with a line a cell."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        names = ("model", "target", "shapes", "scorer", "stages", "threads", "processor")
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    for found in groups.values():
        ordered = sorted(found, key=lambda r: (r["length"], r["batch"]))
        lines = [_line(record, cell) for record in ordered for cell in _by_budget(record)]
        yield f"{_head(ordered)}\n\n{table(COLUMNS, lines)}"


def _head(records: Sequence[Record]) -> str:
    first = records[0]
    repeats = sorted({record["repeats"] for record in records})
    counted = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    return (
        f"## {first['model']}, {first['target']}, {first['shapes']} shapes\n\n"
        f"Scorer {first['scorer']}; {_setting(first)}; {counted} repeats."
    )


def _setting(record: Record) -> str:
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{threads} of {record['processor']}; {packages}"


def _line(record: Record, cell: Record) -> list[str]:
    low, high = cell["overhead_quartiles"]
    return [
        f"{record['length']} x {record['batch']}",
        cell["budget"],
        *(_times(times) for times in (record["dense"], cell["pruned"], cell["ideal"])),
        f"{cell['flops_ratio']:.2f}x",
        f"{cell['speedup']:.2f}x",
        f"{cell['ideal_speedup']:.2f}x",
        f"{cell['overhead']:.2f} ({low:.2f} to {high:.2f})",
        f"{100 * cell['share_of_flops_ratio']:.0f} %",
    ]


def _times(times: Mapping[str, float]) -> str:
    return f"{times['p50']:.4g} ({times['p95']:.4g})"


def _of_corpus(record: Record) -> str:
    """Throughput of each way, then every pruned one over every dense one."""
    head = (
        f"## {record['corpus']}, {record['model']}, {record['target']}, batches of {record['batch']}\n\n"
        f"{record['texts']} texts of up to {record['max_length']} tokens, mean {record['mean_tokens']}, median "
        f"{record['median_tokens']}. Scorer {record['scorer']}; {_setting(record)}; {record['repeats']} repeats. "
        "Budgets are shares of the dense FLOPs on real tokens. Brackets hold the FLOPs ratio."
    )
    lines = [["dense", PADDINGS[p], _rate(record["dense"][p]), "", "", ""] for p in PADDINGS]
    for cell in _by_budget(record):
        for mine, label in PADDINGS.items():
            ratios = [f"{cell['speedup'][mine][p]:.2f}x ({cell['flops_ratio'][mine][p]:.2f}x)" for p in PADDINGS]
            lines.append([f"pruned to {cell['budget']}", label, _rate(cell["pruned"][mine]), *ratios])
    columns = ["", "its texts", "texts a second", *(f"over dense {label}" for label in PADDINGS.values())]
    return f"{head}\n\n{table(columns, lines)}"


def _first_calls(records: Iterable[Record]) -> str:
    """A line a model and target."""
    lines = []
    for record in records:
        calls = record["first_call"]
        times = [f"{c['seconds']:.1f} ({c['cpu_seconds']:.1f})" if (c := calls.get(way)) else "" for way in FIRST_CALLS]
        memory = " to ".join(str(calls[way]["mebibytes"]) for way in FIRST_CALLS[:2])
        lines.append([record["model"], record["target"], str(record["length"]), record["budget"], *times, memory])
    return table(("", "target", "tokens", "budget", *FIRST_CALLS, "MiB, dense to pruned"), lines)


def _rate(figures: Mapping[str, float]) -> str:
    return f"{figures['texts_per_second']:.4g}"


def _by_budget(record: Record) -> list[Record]:
    return sorted(record["cells"], key=lambda cell: Fraction(cell["budget"]), reverse=True)
