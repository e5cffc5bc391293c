"""Parts of pages that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of cells that are text already."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def setting(shared: Mapping[str, Any]) -> str:
    """On what a group was measured, in one line; what older rows did not record is left out."""
    threads, parts = shared.get("threads"), []
    counted = {None: "", 1: "1 thread"}.get(threads, f"{threads} threads")
    if processor := shared.get("processor"):
        parts.append(f"{counted} of {processor}" if counted else str(processor))
    elif counted:
        parts.append(counted)
    parts.append(", ".join(f"{name} {version}" for name, version in shared.get("versions", {}).items()))
    parts.append(str(shared.get("date", "")))
    return "; ".join(part for part in parts if part)


def settings(groups: Iterable[Any]) -> str:
    """The different `setting` of several groups, as one paragraph."""
    found = list(dict.fromkeys(setting(group.shared) for group in groups))
    return "Measured with: " + " / ".join(found) + "."


def spread(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, ± half the way from the lowest to the highest."""
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"
