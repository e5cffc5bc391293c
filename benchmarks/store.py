"""Results as compact rows: ``benchmarks/results/<task>.jsonl``, one line a cell.

A line ``{"all": {...}}`` holds what the lines after it share: what was measured, on which processor and day, with which
versions. `read` gives such groups, `put` adds or replaces one. Tables are made from these files alone.
"""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_CPUINFO = Path("/proc/cpuinfo")


@dataclass
class Group:
    """Rows that were measured together, and what they share. ``seconds`` among it says that none is missing."""

    shared: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return "seconds" in self.shared

    def matches(self, key: Mapping[str, Any]) -> bool:
        """Whether it is the group that was measured for ``key``."""
        return all(self.shared.get(name) == value for name, value in key.items())

    def lines(self) -> Iterable[str]:
        yield _line({"all": self.shared})
        yield from map(_line, self.rows)


def read(task: str, folder: Path = RESULTS) -> list[Group]:
    """All groups of a task, in the order in which they were measured; none where it has no file."""
    file = folder / f"{task}.jsonl"
    groups: list[Group] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        found = json.loads(line)
        if "all" in found:
            groups.append(Group(found["all"]))
        else:
            groups[-1].rows.append(found)
    return groups


def put(task: str, key: Mapping[str, Any], group: Group, folder: Path = RESULTS) -> None:
    """Keep a group in place of the one that ``key`` matches. Several processes may do so at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{task}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        groups = read(task, folder)
        at = next((i for i, one in enumerate(groups) if one.matches(key)), len(groups))
        groups[at : at + 1] = [group]
        part = folder / f"{task}.jsonl.part"
        part.write_text("".join(f"{line}\n" for one in groups for line in one.lines()), encoding="utf-8")
        part.replace(folder / f"{task}.jsonl")


def find(groups: Iterable[Group], key: Mapping[str, Any]) -> Group | None:
    return next((group for group in groups if group.matches(key)), None)


def stages_text(stages: Iterable[Any]) -> str:
    """Stages of a plan in a row: ``1:1/2 3:1/4`` keeps 1/2 from block 1 on and 1/4 from block 3 on."""
    return " ".join(f"{stage.layer}:{stage.keep}" for stage in stages)


def conditions(*packages: str, threads: int, device: str = "cpu") -> dict[str, Any]:
    """The day, the processor and the versions of what takes part: seconds mean nothing elsewhere."""
    names = ("prunepass", "torch", "transformers", *packages)
    return {
        "date": date.today().isoformat(),
        "threads": threads,
        "processor": processor(device),
        "versions": _of(names),
    }


def processor(device: str = "cpu") -> str:
    """Its name as the operating system has it, with the matrix and vector units that decide how fast it is."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
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


def _of(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found


def _line(found: Mapping[str, Any]) -> str:
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False)
