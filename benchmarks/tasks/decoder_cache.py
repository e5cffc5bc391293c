"""What cutting the cache after the prompt costs in quality, alone and on top of pruning, against the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import prunepass
from benchmarks.decoder.model import Pruned, Subject
from benchmarks.decoder.training import Recipe, train_predictors
from benchmarks.markdown import setting, spread, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.tasks.decoder import BATCH, CONTINUATION, FIGURES, PROMPT, ROWS, Sample, figures, stories
from prunepass import PrunePlan, ScorerSpec

#: shares of what each layer's cache holds after the prompt; 1 leaves it as it is
KEEPS = (1.0, 0.5, 0.25)
#: the prompt's last tokens whose attention decides; all rows protect as many
WINDOW = 16
COLUMNS = ("the prompt", "kept after it", "of the dense cache, %", "perplexity", "agreement, %")


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What cutting the cache after the prompt costs"
    seeds: int = option(3, "how many, of prompts and of training")
    steps: int = option(240, "that predictors are trained for")
    batch: int = option(8, "rows a step of that training")
    learning_rate: float = option(4e-3, "of the predictors")
    rows: int = option(128, f"prompts tested on with each seed; a multiple of {BATCH}")

    def cells(self) -> Iterator[Cell]:
        yield Cell({"model": "stories260K"}, self._measure)

    def _measure(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        subject, train, test = stories()
        recipe = Recipe(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate)
        sizes = {"prompt": PROMPT, "continuation": CONTINUATION, "prompts": self.rows, "window": WINDOW}
        training = asdict(recipe) | {"rows": len(train)}
        shared = {**sizes, "training": training, **conditions("tokenizers", threads=torch.get_num_threads())}
        return shared, measure_caches(subject, train, test, range(self.seeds), recipe, self.rows, BATCH)

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        """A line for each way to prune the prompt and each share of the cache that is kept after it."""
        for group in groups:
            shared, lines = group.shared, []
            for row, keep in dict.fromkeys((found["row"], found["keep"]) for found in group.rows):
                of = [found for found in group.rows if (found["row"], found["keep"]) == (row, keep)]
                shown = [spread([f * found[name] for found in of], digits) for name, (*_, f, digits) in FIGURES.items()]
                held = f"{100 * fmean(found['held'] for found in of):.0f}"
                lines.append(["not pruned" if row == "full" else ROWS[row], f"{keep:g}", held, *shown])
            yield (
                f"## {shared['model']}\n\nThe prompts of the page decoder, pruned to {shared['training']['budget']:g} "
                f"of the FLOPs or not; then each layer but the first keeps a share of its cache by what the last "
                f"{shared['window']} tokens attend to (`prunepass.compress_cache`). {setting(shared)}."
                f"\n\n{table(COLUMNS, lines)}"
            )


class Shortened(Pruned):
    """A model under a plan, whose caches are cut after each prompt.

    Args:
        keep: see `prunepass.compress_cache`.
    """

    def __init__(self, subject: Subject, plan: PrunePlan | None, keep: float) -> None:
        super().__init__(subject, plan)
        self._keep = keep
        #: tokens that the caches held after the prompt, as a share of what the dense model's hold
        self.held = 1.0

    def after_prompt(self, cache: Any, prompt: Tensor) -> Any:
        """The cache that the rest of the text sees."""
        if self._keep < 1:
            cache = prunepass.compress_cache(self._model, cache, prompt, self._keep, window=WINDOW)
        self.held = fmean(layer.keys.shape[2] for layer in cache.layers) / prompt.shape[1]
        return cache


def measure_caches(
    subject: Subject, train: Tensor, test: Tensor, seeds: Sequence[int], recipe: Recipe, rows: int, batch: int
) -> Rows:
    """The full model and trained predictors at the recipe's budget, each with every share of `KEEPS`.

    Args:
        train, test: [N, P + C] ids.
        rows: tested on with each seed; a multiple of ``batch``.
    """
    for seed in seeds:
        sample = Sample.draw(subject, test, rows, seed)
        weights: Mapping[str, Tensor] = train_predictors(subject, train, recipe, seed)
        plan = subject.plan(ScorerSpec("mlp"), recipe.budget, recipe.predictor, weights=weights)
        for name, chosen in (("full", None), ("mlp", plan)):
            for keep in KEEPS:
                torch._dynamo.reset()
                made = Shortened(subject, chosen, keep)
                found = figures(made, sample, batch)
                yield {"row": name, "keep": keep, "seed": seed, **found, "held": round(made.held, 4)}
