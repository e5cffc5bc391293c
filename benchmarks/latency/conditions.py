"""What a measurement was taken on: its seconds mean nothing elsewhere."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency.targets import Target

__all__ = ["conditions"]

_CPUINFO = Path("/proc/cpuinfo")


def conditions(target: Target, threads: int) -> dict[str, Any]:
    """For JSON: precision, device, threads, processor and the versions of all that took part."""
    return {
        "runtime": target.runtime,
        "precision": target.precision,
        "device": target.device,
        "threads": threads,
        "processor": torch.cuda.get_device_name() if target.device == "cuda" else _processor(),
        "versions": _versions("prunepass", "torch", "transformers", *target.packages),
    }


def _processor() -> str:
    """Its name as the operating system has it, with the matrix and vector units that decide how fast it is."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not a Linux
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    units = [flag for flag in ("avx2", "avx512f", "amx_bf16", "amx_int8") if flag in found.get("flags", "").split()]
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(units)})" if units else name


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found
