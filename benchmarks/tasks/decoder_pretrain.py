"""Trains the small Llama that decoder and decoder-recall measure, on running text with recall mixed in."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decoder.pretrain import Recipe, pretrain
from benchmarks.places import cache_folder
from benchmarks.task import Say, Task, option


@dataclass(frozen=True)
class Benchmark(Task):
    name: str = option("recall-llama", "folder of the model, in the benchmark's cache")
    width: int = option(Recipe.width, "of the residual stream")
    layers: int = option(Recipe.layers, "blocks")
    heads: int = option(Recipe.heads, "query heads; half as many of keys and values")
    vocab: int = option(Recipe.vocab, "tokens of the tokenizer, which is trained, too")
    steps: int = option(Recipe.steps, "of the training")
    batch: int = option(Recipe.batch, "tokens a step")
    learning_rate: float = option(Recipe.learning_rate, "at its highest")
    seed: int = option(0, "of weights and data")

    def prepare(self, say: Say) -> None:
        options = {k: v for k, v in vars(self).items() if k != "name"}
        folder = cache_folder() / self.name
        record = pretrain(Recipe(**options, kv_heads=max(1, self.heads // 2)), folder)
        say(f"{record['weights']} weights, {record['seconds']} s, {record['curve'][-1]}\nWritten: {folder}")
