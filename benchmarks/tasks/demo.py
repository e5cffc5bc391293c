"""The demo's semantic search: dense, pruned, pruned by trained predictors, and texts cut to the FLOPs of the second."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, option
from prunepass import PrunePlan
from prunepass.errors import PruneError

_ROOT = Path(__file__).parents[2]
#: of a run that failed, the last characters of what it said
_LAST_WORDS = 600


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Search: the demo"
    introduction = (
        "What `make demo` measures: documentation of numpy, scipy and torch through all-MiniLM-L6-v2 and OpenVINO, all "
        "ways in turns; medians. *overlap@10* and *Kendall tau* compare with the dense ranking on 24 queries. *Found* "
        "is the share of documents that are among the ten best for a sentence drawn from anywhere in the part that the "
        "dense model sees."
    )
    documents: int = option(1200, "how many, at most")
    precision: str = option("auto", "f32, bf16, or auto for the runtime's choice")

    def cells(self) -> Iterator[Cell]:
        yield Cell({"documents": self.documents, "asked": self.precision}, partial(measure, self))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        columns = ("", "documents a second", "speedup", "FLOPs", "overlap@10", "Kendall tau", "found")
        for group in groups:
            shared, dense = group.shared, group.rows[0]["documents_per_second"]
            lines = [
                [
                    row["way"],
                    f"{row['documents_per_second']:.1f}",
                    f"{row['documents_per_second'] / dense:.2f}",
                    f"1 / {row['flops_ratio']:.2f}",
                    f"{row['overlap_at_10']:.3f}",
                    f"{row['kendall_tau']:.3f}",
                    f"{row['found']:.1%}",
                ]
                for row in group.rows
            ]
            plan = f"Pruned: `{shared['stages']}` (block:share kept), scorer {shared['scorer']}."
            heading = f"## {shared['documents']} documents, {shared['precision']}"
            yield f"{heading}\n\n{plan} {setting(shared)}.\n\n{table(columns, lines)}"


def measure(options: Benchmark, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row a way, as the demo itself writes them.

    Raises:
        PruneError: the demo fails; the message has its last words.
    """
    with tempfile.TemporaryDirectory(prefix="prunepass-demo-") as folder:
        out = Path(folder) / "out"
        asked = ["--documents", str(options.documents), "--out", str(out), "--precision", options.precision]
        command = [sys.executable, str(_ROOT / "examples" / "demo.py"), *asked]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PruneError(f"The demo failed: {(done.stderr or done.stdout).strip()[-_LAST_WORDS:]}")
        found = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    plan = PrunePlan.from_dict(found["plan"])
    shared = conditions("openvino", threads=torch.get_num_threads()) | {
        "precision": found["precision"],
        "stages": stages_text(plan.stages),
        "scorer": plan.scorer.name,
    }
    return shared, [
        {"way": way} | {name: round(value, 4) for name, value in row.items()} for way, row in found["ways"].items()
    ]
