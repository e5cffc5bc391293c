"""``python -m benchmarks.decoder``: a command for each step, from small models to the table."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.accuracy.places import cache_folder
from prunepass.errors import PruneError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

Steps = Annotated[int, typer.Option(help="That predictors are trained for.")]
Batch = Annotated[int, typer.Option(help="Rows a step of that training.")]
LearningRate = Annotated[float, typer.Option(help="Of the predictors.")]
Name = Annotated[str, typer.Option(help="Folder of the model, in the benchmark's cache.")]
Rows = Annotated[int, typer.Option(help="Prompts tested on with each seed; a multiple of 16.")]


@app.callback()
def main() -> None:
    """What pruning the prompt costs a causal model. Texts are read from the folder that PRUNEPASS_DATA names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@app.command()
def stories(
    seeds: Annotated[int, typer.Option(help="How many, of prompts, of random scores and of training.")] = 3,
    steps: Steps = 300,
    batch: Batch = 16,
    learning_rate: LearningRate = 2e-3,
    rows: Rows = 128,
) -> None:
    """Train predictors for stories260K, frozen, and measure all rows at all budgets."""
    from benchmarks.decoder.predictors import Recipe
    from benchmarks.decoder.results import run_stories

    recipe = Recipe(steps=steps, batch=batch, learning_rate=learning_rate)
    console.print(f"Written: {run_stories(seeds, recipe, rows, batch=16)}", highlight=False)


@app.command()
def caches(
    seeds: Annotated[int, typer.Option(help="How many, of prompts and of training.")] = 3,
    steps: Steps = 240,
    batch: Batch = 8,
    learning_rate: LearningRate = 4e-3,
    rows: Rows = 128,
) -> None:
    """Cut stories260K's cache after the prompt, full and pruned, and measure what it costs."""
    from benchmarks.decoder.predictors import Recipe
    from benchmarks.decoder.results import run_caches

    recipe = Recipe(steps=steps, batch=batch, learning_rate=learning_rate)
    console.print(f"Written: {run_caches(seeds, recipe, rows, batch=16)}", highlight=False)


@app.command()
def pretrain(
    width: Annotated[int, typer.Option(help="Of the residual stream.")] = 384,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 6,
    heads: Annotated[int, typer.Option(help="Query heads; half as many of keys and values.")] = 6,
    vocab: Annotated[int, typer.Option(help="Tokens of the tokenizer, which is trained, too.")] = 2048,
    steps: Annotated[int, typer.Option(help="Of the training.")] = 3600,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    name: Name = "recall-llama",
) -> None:
    """Train a small Llama on stories, WikiText-2 and essays with recall mixed in: on the GPU, or on the CPU."""
    from benchmarks.decoder.pretrain import Recipe
    from benchmarks.decoder.pretrain import pretrain as run

    recipe = Recipe(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=max(1, heads // 2),
        vocab=vocab,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
    )
    folder = cache_folder() / name
    record = run(recipe, folder)
    console.print(f"{record['weights']} weights, {record['seconds']} s, {record['curve'][-1]}", highlight=False)
    console.print(f"Written: {folder}", highlight=False)


@app.command()
def predictors(
    name: Name = "recall-llama",
    seeds: Annotated[int, typer.Option(help="How many, of training.")] = 3,
    steps: Steps = 120,
    batch: Batch = 8,
    learning_rate: LearningRate = 2e-3,
    rows: Annotated[int, typer.Option(help="That they learn from, of text and of recall.")] = 960,
) -> None:
    """Train predictors for a model that the command pretrain wrote, frozen: one set for all that is measured on it."""
    from benchmarks.decoder.predictors import Recipe
    from benchmarks.decoder.pretrained import Pretrained
    from benchmarks.decoder.results import CONTINUATION, PROMPT

    recipe = Recipe(steps=steps, batch=batch, learning_rate=learning_rate)
    folder = Pretrained(cache_folder() / name).train(recipe, range(seeds), PROMPT, CONTINUATION, rows)
    console.print(f"Written: {folder}", highlight=False)


@app.command()
def texts(
    name: Name = "recall-llama",
    seeds: Annotated[int, typer.Option(help="How many, of prompts, of random scores and of predictors.")] = 3,
    rows: Rows = 32,
) -> None:
    """Measure all rows at all budgets on stories, WikiText-2 and essays, on a model that the command pretrain wrote."""
    from benchmarks.decoder.results import run_texts

    for path in run_texts(cache_folder() / name, seeds, rows, batch=16):
        console.print(f"Written: {path}", highlight=False)


@app.command()
def recall(
    name: Name = "recall-llama",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "128,384",
    budget: Annotated[float, typer.Option(help="Share of the dense prefill's FLOPs.")] = 0.6,
    seeds: Annotated[int, typer.Option(help="How many, of questions, of random scores and of predictors.")] = 3,
    rows: Annotated[int, typer.Option(help="Questions at each depth, with each seed.")] = 16,
) -> None:
    """Pass keys and key-value pairs by length and depth, on a model that the command pretrain wrote."""
    from benchmarks.decoder.predictors import Recipe
    from benchmarks.decoder.retrieval import run_recall

    recipe = Recipe(budget=budget)
    path = run_recall(cache_folder() / name, tuple(map(int, lengths.split(","))), recipe, seeds, rows)
    console.print(f"Written: {path}", highlight=False)


@app.command()
def speed(
    model: Annotated[str, typer.Option(help="llama-1b or llama-7b, with random weights.")] = "llama-1b",
    target: Annotated[str, typer.Option(help="Of torch.compile: eager or inductor.")] = "eager",
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "512,1024,2048,4096,8192",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Calls of each way that count.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="PyTorch's.", min=1)] = 1,
) -> None:
    """Time to first token, decode rate and memory, dense and under SDTP's schedule, by length of the prompt."""
    from benchmarks.decoder.results import FOLDER
    from benchmarks.decoder.speed import Speed, run_speed

    wanted = Speed(model, target, dtype, device, repeats=repeats, threads=threads)
    path = run_speed(wanted, tuple(map(int, lengths.split(","))), FOLDER)
    console.print(f"Written: {path}", highlight=False)


@app.command()
def table() -> None:
    """Table from the results at hand."""
    from benchmarks.decoder import tables

    console.print(f"Written: {tables.write()}", highlight=False)


if __name__ == "__main__":
    try:
        app()
    except PruneError as e:
        raise SystemExit(str(e)) from e
