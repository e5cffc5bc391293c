"""The report that `prunepass.explain` gives: its data, shown as text and as HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from prunepass.plan.folders import as_path, writing
from prunepass.plan.values import shown
from prunepass.report.data import ReportData
from prunepass.report.html import render_html
from prunepass.report.text import render_text

__all__ = ["Report"]


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """What `prunepass.explain` found. ``str(report)`` is the text; `to_html` and `to_dict` hold the same, and a
    notebook shows the page.
    """

    def __repr__(self) -> str:
        if self.refusals:
            return f"Report({self.model}: refused, {shown(self.refusals[0].reason)})"
        if self.parts:
            each = "; ".join(f"{p.part}, {len(p.stages)} stages in {len(p.blocks)} blocks" for p in self.parts)
            return f"Report({self.model}: {each})"
        return f"Report({self.model}: {len(self.stages)} stages in {len(self.blocks)} blocks)"

    def _repr_html_(self) -> str:
        """What notebooks show: the page of `to_html` in a frame, whose style then is not the notebook's."""
        page = escape(render_html(self), quote=True)
        return f'<iframe srcdoc="{page}" title="prunepass" style="width: 100%; height: 640px; border: 0"></iframe>'

    def __str__(self) -> str:
        return render_text(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML file (no scripts, nothing loaded from outside). Returns its path.

        Raises:
            ExportError: the disk is full, or refuses.
        """
        file = as_path(path)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(render_html(self), encoding="utf-8")
        return file
