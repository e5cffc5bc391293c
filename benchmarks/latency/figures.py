"""Table and plots, made from the results at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.latency import results
from benchmarks.latency.tables import markdown
from prunepass.errors import OptionError

__all__ = ["write"]

COLUMNS = 3
Record = Mapping[str, Any]


def write(folder: Path = results.FOLDER) -> list[Path]:
    """Write ``table.md`` into the folder, and ``speedup.png`` and ``overhead.png`` where cells were measured.

    Returns:
        the files written.

    Raises:
        OptionError: there are no results.
    """
    records, corpora = list(results.read(folder)), list(results.read_corpora(folder))
    compiling = list(results.read_compiling(folder))
    if not records and not corpora and not compiling:
        raise OptionError(f"There are no results in {folder}; make some with the command run.")
    table = folder / "table.md"
    table.write_text(markdown(records, corpora, compiling), encoding="utf-8")
    if not records:
        return [table]
    speedup = _plot(records, "speedup", "times as fast as dense", folder / "speedup.png")
    return [table, speedup, _plot(records, "overhead", "pruned over ideal time", folder / "overhead.png")]


def _plot(records: Sequence[Record], figure: str, label: str, file: Path) -> Path:
    """A figure of the cells against the FLOPs ratio: a panel a model and target, a line a length and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[Record]] = {}
    for record in records:
        panels.setdefault(_title(record), []).append(record)
    columns = min(COLUMNS, len(panels))
    height = math.ceil(len(panels) / columns)
    size = (3.8 * columns, 3.2 * height)
    drawn, grid = plt.subplots(height, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, (title, found) in zip(grid.flat, panels.items(), strict=False):
        _draw(panel, found, figure)
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("times fewer FLOPs", fontsize=8)
        panel.set_ylabel(label, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    for panel in grid.flat[len(panels) :]:
        panel.set_axis_off()
    drawn.savefig(file, dpi=110)
    plt.close(drawn)
    return file


def _draw(panel: Any, records: Sequence[Record], figure: str) -> None:
    """Dashed is the ideal speed-up; grey is a speed-up of just the FLOPs ratio, or no overhead."""
    ratios = [cell["flops_ratio"] for record in records for cell in record["cells"]]
    ends = [1.0, max(ratios)]
    panel.plot(ends, ends if figure == "speedup" else [1.0, 1.0], color="0.6", linewidth=0.8)
    for record in sorted(records, key=lambda r: (r["length"], r["batch"])):
        cells = sorted(record["cells"], key=lambda cell: cell["flops_ratio"])
        x = [cell["flops_ratio"] for cell in cells]
        (line,) = panel.plot(
            x, [c[figure] for c in cells], marker="o", markersize=3, label=f"{record['length']} x {record['batch']}"
        )
        if figure == "speedup":
            panel.plot(x, [c["ideal_speedup"] for c in cells], color=line.get_color(), linestyle="--", linewidth=0.8)


def _title(record: Record) -> str:
    """Cells of one panel differ in length and batch alone."""
    plan = f"{record['scorer']}, {record['stages']} stages, {record['threads']} threads"
    return f"{record['model']}, {record['target']}, {record['shapes']}\n{plan}"
