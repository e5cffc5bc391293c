"""The most memory that a call holds beyond what was held before it, on a GPU or in the process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MEBIBYTE = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # in malloc.h
#: bytes from which glibc maps a block on its own: while watching, and the most that it comes to by itself
_WATCHING, _AFTER = 2**16, 2**25


@dataclass
class Peak:
    """What was found.

    Attributes:
        mebibytes: None until the watched code has run, and where it cannot be told.
    """

    mebibytes: float | None = None


@contextmanager
def watch_peak(device: str) -> Iterator[Peak]:
    """Watch the code within. On the CPU it is what the whole process holds, in pages, and is told by glibc on Linux
    alone; tensors go back to the system as soon as they are freed meanwhile, which takes time."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        yield peak
        peak.mebibytes = (torch.cuda.max_memory_allocated() - before) / _MEBIBYTE
        return
    try:
        libc: Any = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _WATCHING)
        libc.malloc_trim(0)  # what was freed before is not held
        _CLEAR.write_text("5")  # man 5 proc_pid_clear_refs: the peak counts anew
    except (AttributeError, OSError, TypeError):  # another C library, no such file, Windows
        yield peak
        return
    held = _status("VmRSS")
    try:
        yield peak
        peak.mebibytes = max(0.0, _status("VmHWM") - held)  # the kernel counts pages in batches
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _AFTER)


def _status(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) / 1024
