"""Trains predictors for a model of decoder-pretrain, or Gemma, frozen: one set for all that is measured on it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decoder.gemma import NAME, pretrained
from benchmarks.decoder.training import Recipe
from benchmarks.task import Say, Task, option


@dataclass(frozen=True)
class Benchmark(Task):
    name: str = option("recall-llama", f"folder of the model, in the benchmark's cache, or {NAME}")
    seeds: int = option(3, "how many, of training")
    steps: int = option(120, "of the training")
    batch: int = option(8, "rows a step")
    learning_rate: float = option(2e-3, "of the predictors")
    bf16: bool = option(False, "compute in bfloat16")
    rows: int = option(960, "that they learn from, of text and of recall")

    def prepare(self, say: Say) -> None:
        recipe = Recipe(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, bf16=self.bf16)
        say(f"Written: {pretrained(self.name).train(recipe, range(self.seeds), self.rows)}")
