"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cores"]

_CGROUP = Path("/sys/fs/cgroup")


def cores(group: Path = _CGROUP) -> int:
    """The cores that the process may run on, or as many as its control group has time for, where that is less.

    Args:
        group: folder of the control group; a container sees its own there.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(group)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(group: Path) -> float | None:
    """Cores' worth of time, as version 2 or 1 of control groups says it; None without a limit."""
    try:
        limit, period = (group / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            limit = (group / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (group / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    try:
        share = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None
