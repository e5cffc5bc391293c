"""The most memory that a call holds beyond what was held before it, on a GPU or in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "watch_peak"]

_MEBIBYTE = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """What was found.

    Attributes:
        mebibytes: None until the watched code has run, and where it cannot be told.
    """

    mebibytes: float | None = None


@contextmanager
def watch_peak(device: str) -> Iterator[Peak]:
    """Watch the code within. On the CPU it is what the whole process holds, in pages, and is told on Linux alone."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        yield peak
        peak.mebibytes = (torch.cuda.max_memory_allocated() - before) / _MEBIBYTE
        return
    held = _held_by_process()
    yield peak
    if held is not None:
        peak.mebibytes = max(0.0, _status("VmHWM") - held)  # the kernel counts pages in batches


def _held_by_process() -> float | None:
    """What the process holds now, from where its peak counts anew; None where it cannot be."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else pages that were freed before count as held
        _CLEAR.write_text("5")  # man 5 proc_pid_clear_refs: resets the peak
    except (AttributeError, OSError, TypeError):  # not glibc, no such file, Windows
        return None
    return _status("VmRSS")


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) / 1024
