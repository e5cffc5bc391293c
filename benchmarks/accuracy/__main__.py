"""``python -m benchmarks.accuracy``: a command for each step, from dense models to plots."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import teachers as dense
from benchmarks.accuracy.tasks import TASKS, find_task
from prunepass.errors import OptionError, PruneError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

Names = Annotated[list[str] | None, typer.Argument(help=f"Tasks, of: {', '.join(TASKS)}. All by default.")]


@app.callback()
def main() -> None:
    """What pruning costs in accuracy. Data sets are read from the folder that PRUNEPASS_DATA names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@app.command()
def teachers(
    names: Names = None,
    max_steps: Annotated[int | None, typer.Option(help="A trial: train so many steps, and keep nothing.")] = None,
) -> None:
    """Train the dense models that are missing, and score all."""
    table = Table("task", "score", "", "test examples", "mean tokens", "training seconds")
    for task in [find_task(name) for name in names or TASKS]:
        record = dense.teacher(task, max_steps=max_steps)
        table.add_row(
            task.name,
            f"{record['scores'][task.headline]:.4f}",
            task.headline,
            str(record["test"]["examples"]),
            str(record["test"]["mean_tokens"]),
            str(record.get("training", {}).get("seconds", "")),
        )
    console.print(table)


@app.command()
def truncation(names: Names = None) -> None:
    """Score the dense models on texts cut to each budget of FLOPs, beside the dense score: "score @tokens kept"."""
    from benchmarks.accuracy.truncation import SHARES, truncation

    tokenizer = dense.load_tokenizer()
    table = Table("task", "dense", *map(str, SHARES))
    for task in [find_task(name) for name in names or TASKS]:
        record = dense.teacher(task)
        model = task.build_dense(dense.model_folder(task))
        figures = truncation(task, model, tokenizer, task.test())
        dense.keep(f"{task.name}.truncation", figures)
        cells = [f"{row[task.headline]:.4f} @{row['cut']}" for row in figures.values()]
        table.add_row(task.name, f"{record['scores'][task.headline]:.4f}", *cells)
    console.print(table)


@app.command()
def run(
    names: Names = None,
    rows: Annotated[
        str, typer.Option(help="Rows: free (random, attention), truncated, top, sdtp, both.")
    ] = "free,both",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 1,
    every: Annotated[int | None, typer.Option(help="Score only every so many test examples.")] = None,
) -> None:
    """Prune and score. Each row of each task and seed is one file of results; those that are there are left alone."""
    from benchmarks.accuracy import results

    for task in [find_task(name) for name in names or TASKS]:
        for seed in range(seeds):
            results.run(task, rows.split(","), seed, every)


@app.command()
def deployed(
    names: Names = None,
    budgets: Annotated[str, typer.Option(help="Shares of FLOPs, of those that run trained.")] = "2/5",
    seed: Annotated[int, typer.Option(help="Which of the trained models.")] = 0,
    every: Annotated[int | None, typer.Option(help="Score only every so many test examples.")] = None,
    texts: Annotated[int, typer.Option(help="How many texts to time.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="How often to time each.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Of the runtime; its own choice by default.")] = None,
) -> None:
    """Row "both" exported to OpenVINO: is it as accurate as in training, and how fast is it?"""
    from benchmarks.accuracy import results
    from benchmarks.accuracy.deployed import Timing, check

    try:
        shares = [Fraction(share) for share in budgets.split(",")]
    except (ValueError, ZeroDivisionError):
        raise OptionError(f"--budgets takes fractions such as 1/2,2/5, not {budgets!r}.") from None
    for task in [find_task(name) for name in names or TASKS]:
        record = check(task, seed, shares, every, Timing(texts, repeats, threads))
        path = results.write_deployed(task, seed, record)
        for found in record["budgets"]:
            hidden, gone = (found[way][task.headline] for way in ("masked", "deployed"))
            console.print(f"{task.name} {found['budget']:.3f}: {task.headline} hidden {hidden:.4f}, gone {gone:.4f}")
        console.print(*(f"{way['row']} {way['milliseconds']:.2f} ms" for way in record["latency"]["ways"]), sep=", ")
        console.print(f"Written: {path}", highlight=False)


@app.command()
def plot() -> None:
    """Table and plots from the results at hand."""
    from benchmarks.accuracy import figures

    for path in figures.write():
        console.print(f"Written: {path}", highlight=False)


if __name__ == "__main__":
    try:
        app()
    except PruneError as e:
        raise SystemExit(str(e)) from e
