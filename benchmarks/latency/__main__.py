"""``python -m benchmarks.latency``: measure cells, then make table and plots of them."""

from __future__ import annotations

import logging
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.latency import results
from benchmarks.latency.compiling import Compiling, measure_compiling
from benchmarks.latency.corpus import CORPORA
from benchmarks.latency.models import MODELS
from benchmarks.latency.sweep import PRESETS, Corpus, Sweep, run_corpus, run_groups
from benchmarks.latency.targets import TARGETS
from prunepass.errors import OptionError, PruneError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

Folder = Annotated[Path, typer.Option(help="Where results lie.")]


@app.callback()
def main() -> None:
    """How fast pruned models are, against dense ones and against what the runtime could give at most."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@app.command()
def run(
    preset: Annotated[str, typer.Option(help=f"What is measured by default: {', '.join(PRESETS)}.")] = "main",
    models: Annotated[str | None, typer.Option(help=f"Of: {', '.join(MODELS)}.")] = None,
    targets: Annotated[str | None, typer.Option(help=f"Of: {', '.join(TARGETS)}.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a row, such as 128,512.")] = None,
    batches: Annotated[str | None, typer.Option(help="Rows a call, such as 1,8.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Shares of the dense FLOPs, such as 1/2,1/4.")] = None,
    shapes: Annotated[str, typer.Option(help="dynamic: compiled for all lengths; static: for each.")] = "dynamic",
    scorer: Annotated[str, typer.Option(help="norm, random, attention, or mlp with random weights.")] = "norm",
    stages: Annotated[int, typer.Option(help="How many stages a plan has; 0: one before every block.", min=0)] = 4,
    repeats: Annotated[int, typer.Option(help="Calls of each way.", min=1)] = 20,
    seconds: Annotated[float | None, typer.Option(help="Begin no further repeat of a cell after so long.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of every runtime; as many as torch takes by default.")] = None,
    corpus: Annotated[str | None, typer.Option(help=f"Throughput on real texts, of: {', '.join(CORPORA)}.")] = None,
    corpus_batches: Annotated[int, typer.Option(help="Batches of texts that --corpus times.", min=1)] = 8,
    again: Annotated[bool, typer.Option(help="Measure what has results already.")] = False,
    folder: Folder = results.FOLDER,
) -> None:
    """Measure. A group of cells with results is left alone; one that cannot be measured here is named and skipped."""
    if preset not in PRESETS:
        raise OptionError(f"There is no preset {preset!r}; there are {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    sweep = Sweep(
        models=_names(models) or chosen.models,
        targets=_names(targets) or chosen.targets,
        lengths=_numbers(lengths, "--lengths") or chosen.lengths,
        batches=_numbers(batches, "--batches") or chosen.batches,
        budgets=_shares(budgets) or chosen.budgets,
        shapes=shapes,
        scorer=scorer,
        stages=stages,
        repeats=repeats,
        seconds=seconds,
        threads=threads or torch.get_num_threads(),
        again=again,
    )
    outcome = run_groups(sweep, folder) if corpus is None else run_corpus(sweep, Corpus(corpus, corpus_batches), folder)
    failed = 0
    for found in outcome:
        console.print(str(found), highlight=False, markup=False, soft_wrap=True)
        failed += found.failed
    if failed:
        raise PruneError(f"{failed} of the groups asked for failed; the reasons stand above.")


@app.command(name="compile")
def compile_(
    models: Annotated[str, typer.Option(help=f"Of: {', '.join(MODELS)}.")] = "minilm-l6,bert-base",
    targets: Annotated[
        str, typer.Option(help=f"Of: {', '.join(TARGETS)}.")
    ] = "openvino-f32,onnxruntime-f32,inductor-f32",
    length: Annotated[int, typer.Option(help="Tokens of the first call.", min=2)] = 128,
    budget: Annotated[str, typer.Option(help="Share of the dense FLOPs.")] = "1/2",
    threads: Annotated[int | None, typer.Option(help="As many as torch takes by default.")] = None,
    folder: Folder = results.FOLDER,
) -> None:
    """What the first call costs, dense, pruned, and from the cache on disk: seconds and memory, in fresh processes."""
    (share,) = _shares(budget)
    for model, target in product(_names(models), _names(targets)):
        wanted = Compiling(model, target, str(share), length, threads=threads or torch.get_num_threads())
        file = results.write(results.compiling_file(wanted, folder), measure_compiling(wanted))
        console.print(f"{model} {target}: written: {file}", highlight=False)


@app.command()
def table(folder: Folder = results.FOLDER) -> None:
    """Table and plots from the results at hand."""
    from benchmarks.latency import figures

    for path in figures.write(folder):
        console.print(f"Written: {path}", highlight=False)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise OptionError(f"{option} takes whole numbers such as 128,512, not {text!r}.") from None


def _shares(text: str | None) -> tuple[Fraction, ...]:
    try:
        shares = tuple(Fraction(part) for part in _names(text))
    except (ValueError, ZeroDivisionError):
        shares = (Fraction(0),)
    if not all(0 < share < 1 for share in shares):
        raise OptionError(f"--budgets takes fractions between 0 and 1 such as 1/2,1/4, not {text!r}.")
    return shares


if __name__ == "__main__":
    try:
        app()
    except PruneError as e:
        raise SystemExit(str(e)) from e
