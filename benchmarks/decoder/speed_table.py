"""Speed by length of the prompt, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.records import table

__all__ = ["speed_part"]

_COLUMNS = (
    "prompt",
    "first token, ms",
    "pruned",
    "times as fast (quartiles)",
    "fewer FLOPs",
    "reached",
    "tokens a second after it",
    "pruned",
    "cache, MiB",
    "pruned",
    "peak, MiB",
    "pruned",
)


def speed_part(record: Mapping[str, Any]) -> str:
    """The part of the page for one record of the command speed."""
    threads = f", {record['threads']} thread{'s' if record['threads'] > 1 else ''}" if record["device"] == "cpu" else ""
    head = (
        f"## Speed: {record['model']}, {record['target']}, {record['precision']}\n\n{record['processor']}{threads}; "
        "random weights, one prompt, `generate()`, SDTP's schedule with predictors as wide as the model, whose time is "
        f"inside; medians of {record['repeats']} calls of each way in turns. *Reached* is the share that the speed-up "
        "is of the FLOPs ratio. The peak is the most that a call holds at any time beyond the model."
    )
    return f"{head}\n\n{table(_COLUMNS, _lines(record))}"


def _lines(record: Mapping[str, Any]) -> Iterator[list[str]]:
    for found in record["speed"]:
        low, high = found["speedup_quartiles"]
        pairs = [
            ["" if (value := found[figure][way]) is None else f"{value:.{digits}f}" for way in ("dense", "pruned")]
            for figure, digits in (("tokens_per_second", 2), ("cache_mebibytes", 1), ("peak_mebibytes", 0))
        ]
        yield [
            str(found["length"]),
            *(f"{found['first_token_ms'][way]['p50']:.0f}" for way in ("dense", "pruned")),
            f"{found['speedup']:.2f} ({low:.2f} to {high:.2f})",
            f"{found['flops_ratio']:.2f}",
            f"{100 * found['share_of_flops_ratio']:.0f} %",
            *(cell for pair in pairs for cell in pair),
        ]
