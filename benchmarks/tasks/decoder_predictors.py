"""Trains predictors for a model of decoder-pretrain, frozen: one set for all that is measured on it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decoder.training import Pretrained, Recipe
from benchmarks.places import cache_folder
from benchmarks.task import Say, Task, option
from benchmarks.tasks.decoder import CONTINUATION, PROMPT


@dataclass(frozen=True)
class Benchmark(Task):
    name: str = option("recall-llama", "folder of the model, in the benchmark's cache")
    seeds: int = option(3, "how many, of training")
    steps: int = option(120, "of the training")
    batch: int = option(8, "rows a step")
    learning_rate: float = option(2e-3, "of the predictors")
    rows: int = option(960, "that they learn from, of text and of recall")

    def prepare(self, say: Say) -> None:
        recipe = Recipe(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate)
        found = Pretrained(cache_folder() / self.name)
        say(f"Written: {found.train(recipe, range(self.seeds), PROMPT, CONTINUATION, self.rows)}")
