"""What pruning a prompt costs a causal model in quality, for every way to rank its tokens, at equal FLOPs.

stories260K, the model that the task decoder-pretrain wrote, and Gemma 3 270M (``--models gemma3-270m``); predictors are
trained here for the first and by the task decoder-predictors for the others. Texts are read from the folder that
PRUNEPASS_DATA names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decoder.gemma import NAME as GEMMA
from benchmarks.decoder.gemma import Gemma, pretrained
from benchmarks.decoder.llama2c import read_model, read_tokenizer
from benchmarks.decoder.model import Oracle, Pruned, Subject
from benchmarks.decoder.texts import CORPORA, read_corpus
from benchmarks.decoder.training import TRAINED, Recipe, Trained, train_all
from benchmarks.markdown import setting, spread, table
from benchmarks.places import data_folder
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option
from prunepass import ScorerSpec

log = logging.getLogger(__name__)

#: tokens of a prompt, and of what follows it; together within stories260K's context of 512
PROMPT, CONTINUATION = 256, 128
#: prompts that run at a time
BATCH = 16
#: shares of the dense prefill's FLOPs
BUDGETS = (0.75, 0.6, 0.45)
#: what the table calls the rows, in its order
ROWS = {
    "random": "random",
    "recency": "sink + recent",
    "norm": "hidden norm",
    "last-row": "last-row attention",
    "mlp": "trained MLP (SDTP)",
    "mlp-positions": "trained MLP with positions",
    "oracle": "gradient oracle",
}
#: rows that differ from seed to seed in more than the prompts
SEEDED = ("random", *TRAINED)
#: rows that the trained predictors must be better than
BASELINES = ("random", "recency", "norm", "last-row")
#: figure -> (heading, 1 where more is better and -1 where less is, factor, digits)
FIGURES = {
    "perplexity": ("Perplexity of the text after the prompt", -1, 1, 3),
    "agreement": ("Agreement with the full model's greedy continuation, %", 1, 100, 2),
}


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What pruning the prompt costs a causal model"
    introduction = (
        "Columns are budgets: FLOPs of the prefill as a share of the dense one's, scoring included, counted on "
        "the graph that ran. All rows have stages before each block but the first and keep the first four tokens "
        "and the last tenth of the prompt. The oracle knows how the text goes on: its scores are the saliency "
        "that the predictors learn, whose computing is not counted. A cell is the mean over the seeds, ± half the "
        "way from the lowest to the highest, most of which comes from which prompts were drawn; the second tables "
        "compare rows on the same prompts."
    )
    models: tuple[str, ...] = option(("stories260K",), f"stories260K, {GEMMA}, or names given to decoder-pretrain")
    corpora: tuple[str, ...] = option(tuple(CORPORA), "that models other than stories260K are measured on")
    ways: tuple[str, ...] = option(tuple(ROWS), "to rank tokens, that are measured")
    budgets: tuple[float, ...] = option(BUDGETS, "shares of the dense prefill's FLOPs")
    at_once: int = option(BATCH, "prompts that run at a time")
    seeds: int = option(3, "how many, of prompts, of random scores and of training")
    rows: int = option(128, "prompts tested on with each seed; a multiple of those that run at a time")
    steps: int = option(300, "that predictors of stories260K are trained for")
    batch: int = option(16, "rows a step of that training")
    learning_rate: float = option(2e-3, "of these predictors")

    def cells(self) -> Iterator[Cell]:
        for corpus in self.corpora:
            chosen(corpus, CORPORA, "corpus")
        for way in self.ways:
            chosen(way, ROWS, "way to rank tokens")
        for model in self.models:
            if model == "stories260K":
                yield Cell({"model": model}, self._stories)
                continue
            for corpus in self.corpora:
                yield Cell({"model": f"{model}: {corpus}"}, partial(self._pretrained, model, corpus))

    def _stories(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        subject, train, test = stories()
        recipe = Recipe(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate)
        training = asdict(recipe) | {"rows": len(train)}
        return self._shared(training), self._measure(
            subject, train_all(subject, train, recipe, range(self.seeds)), test
        )

    def _pretrained(self, model: str, corpus: str, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        found = pretrained(model)
        weights, training = found.trained(range(self.seeds), self.ways)
        test = found.rows([corpus], "test", found.prompt + found.rest)
        subject = Subject(found.measured, found.prompt, found.layers)
        return self._shared(dict(training), found.prompt, found.rest), self._measure(subject, weights, test)

    def _shared(
        self, training: dict[str, Any], prompt: int = PROMPT, continuation: int = CONTINUATION
    ) -> dict[str, Any]:
        sizes = {"prompt": prompt, "continuation": continuation, "prompts": self.rows}
        return {**sizes, "training": training, **conditions("tokenizers", threads=torch.get_num_threads())}

    def _measure(self, subject: Subject, weights: Trained, test: Tensor) -> Rows:
        """All rows, budget by budget; ``test`` holds ids [N, P + C]."""
        batch = self.at_once
        samples = {seed: Sample.draw(subject, test, self.rows, seed) for seed in range(self.seeds)}
        for seed, sample in samples.items():
            yield {"row": "full", "budget": 1.0, "seed": seed, "flops": 1.0} | figures(Pruned(subject), sample, batch)
        for budget in self.budgets:
            made = cache(lambda row, seed, b=budget: pruned_row(subject, row, b, seed, weights, batch))
            for row in (way for way in ROWS if way in self.ways):
                for seed, sample in samples.items():
                    pruned, plan = made(row, seed if row in SEEDED else None)
                    found = figures(pruned, sample, batch)
                    log.info("%s at %s: %s", row, budget, found)
                    flops = round(pruned.flops(batch), 5)
                    yield {"row": row, "budget": budget, "seed": seed, "flops": flops, **found, "plan": plan}

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            shared, rows = group.shared, group.rows
            furthest = max(abs(row["flops"] / row["budget"] - 1) for row in rows)
            stages = _of_gemma(shared["training"]) if shared["model"].split(":")[0] == GEMMA else ""
            yield (
                f"## {shared['model']}\n\nPrompts of {shared['prompt']} tokens, {shared['continuation']} tokens after "
                f"them, {shared['prompts']} prompts with each of {len({row['seed'] for row in rows})} seeds. "
                f"FLOPs are within {furthest:.2%} of the column. {setting(shared)}.{stages}"
            )
            for figure, (heading, *_) in FIGURES.items():
                yield f"### {heading}\n\n{_figure(rows, figure)}\n\n{_contest(rows, figure)}"


@dataclass(frozen=True)
class Sample:
    """Prompts with what follows them.

    Attributes:
        text: [R, P + C] ids of real text.
        greedy: [R, P + C], the same prompts with the dense model's own greedy continuation.
    """

    text: Tensor
    greedy: Tensor

    @classmethod
    def draw(cls, subject: Subject, pool: Tensor, rows: int, seed: int) -> Sample:
        """``rows`` rows of ``pool`` [N, P + C], chosen by ``seed``."""
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        text = pool[order[:rows]]
        prompts, new = text[:, : subject.prompt], text.shape[1] - subject.prompt
        model: Any = subject.model
        # an end of the text is a token like others, so that all rows are equally long
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None}
        mask = torch.ones_like(prompts)
        return cls(text, model.generate(prompts, attention_mask=mask, do_sample=False, **lengths))


def figures(pruned: Pruned, sample: Sample, batch: int) -> dict[str, float]:
    """``perplexity`` of the text after the prompts; ``agreement``: the share of the tokens of the dense model's own
    greedy continuation that this model would choose, too, given those before."""
    loss = same = 0.0
    for text, greedy in zip(sample.text.split(batch), sample.greedy.split(batch), strict=True):
        logits = pruned.logits(text)
        loss += float(F.cross_entropy(logits.flatten(0, 1), text[:, -logits.shape[1] :].flatten(), reduction="sum"))
        same += float((pruned.logits(greedy).argmax(-1) == greedy[:, -logits.shape[1] :]).sum())
    tokens = len(sample.text) * logits.shape[1]
    return {"perplexity": round(exp(loss / tokens), 5), "agreement": round(same / tokens, 5)}


def pruned_row(
    subject: Subject, row: str, budget: float, seed: int | None, weights: Trained, batch: int
) -> tuple[Pruned, str]:
    """The model compiled with the plan of one of `ROWS`, and the plan's stages as text.

    Args:
        seed: of the random scores, or whose of the ``weights`` the predictors have; None for rows without.
        batch: prompts that run at a time.
    """
    prepare = None
    if row == "oracle":
        oracle = Oracle(subject, budget, batch)
        plan, prepare = oracle.plan, oracle.prepare
    elif row in TRAINED:
        assert seed is not None
        plan = subject.plan(ScorerSpec("mlp"), budget, Recipe().of(row).predictor, weights=weights[row, seed])
    else:
        plan = subject.plan(ScorerSpec.of({"name": row, "seed": seed} if row == "random" else row), budget)
    return Pruned(subject, plan, prepare), stages_text(plan.stages)


def stories() -> tuple[Subject, Tensor, Tensor]:
    """stories260K, and rows [N, P + C] to learn from and to test on: the beginnings of stories that are long enough."""
    checkpoint: Path = data_folder() / "stories260K"
    tokenizer, corpus = read_tokenizer(checkpoint / "tok512.bin"), read_corpus("stories")
    train, test = (story_rows(tokenizer, texts) for texts in (corpus.train, corpus.test))
    return Subject(read_model(checkpoint / "stories260K.bin"), PROMPT), train, test


def story_rows(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[N, P + C] ids."""
    length = PROMPT + CONTINUATION
    rows = ([tokenizer.bos_token_id, *tokenizer(story).input_ids] for story in texts)
    return torch.tensor([row[:length] for row in rows if len(row) >= length])


# -- page ------------------------------------------------------------------------------------------------------------

Found = Sequence[Mapping[str, Any]]


def _of_gemma(training: Mapping[str, Any]) -> str:
    """What is to be known of Gemma's rows."""
    said = (
        f" Stages stand before blocks {', '.join(map(str, Gemma.layers))} of 18 alone, and the model computes in "
        "bfloat16: the full model's agreement with itself shows what rounding does."
    )
    if not training:  # no predictors among the rows
        return said
    return (
        f"{said} The predictors learned for "
        f"{training['steps']} steps of {training['batch']} row of {training['prompt'] + training['rest']} tokens, "
        "which is too little to say how well trained ones would do."
    )


def _figure(rows: Found, figure: str) -> str:
    _, sign, factor, digits = FIGURES[figure]
    full = [factor * row[figure] for row in rows if row["row"] == "full"]
    budgets = _budgets(rows)
    lines = [["full model", spread(full, digits), *[""] * len(budgets)]]
    for row, label in ROWS.items():
        if not (cells := [v for budget in budgets if (v := _values(rows, row, budget, figure).values())]):
            continue
        lines.append([label, "", *(spread([factor * v for v in cell], digits) for cell in cells)])
    for trained in _trained(rows) if any(row["row"] == "oracle" for row in rows) else ():
        cells = []
        for budget in budgets:
            bound = _values(rows, "oracle", budget, figure)
            mine = _values(rows, trained, budget, figure)
            cells.append(spread([factor * sign * (bound[seed] - value) for seed, value in mine.items()], digits))
        lines.append([f"from {ROWS[trained]} to the oracle", "", *cells])
    return table(["", "1", *(f"{budget:g}" for budget in budgets)], lines)


def _contest(rows: Found, figure: str) -> str:
    """On how many seeds the trained predictors are better than each baseline."""
    budgets = _budgets(rows)
    lines = [
        [f"{ROWS[trained]}, than {ROWS[row]}", *(_wins(rows, trained, row, budget, figure) for budget in budgets)]
        for trained in _trained(rows)
        for row in BASELINES
    ]
    return table(["better (seeds of all)", *(f"{b:g}" for b in budgets)], lines)


def _wins(rows: Found, trained: str, row: str, budget: float, figure: str) -> str:
    mine, other = (_values(rows, name, budget, figure) for name in (trained, row))
    sign = FIGURES[figure][1]
    wins = sum(sign * (mine[seed] - other[seed]) > 0 for seed in mine)
    better = sign * (fmean(mine.values()) - fmean(other.values())) > 0
    return f"{wins} of {len(mine)}" + ("" if better else ", worse in the mean")


def _trained(rows: Found) -> list[str]:
    return [row for row in TRAINED if row in {found["row"] for found in rows}]


def _values(rows: Found, row: str, budget: float, figure: str) -> dict[int, float]:
    """By seed."""
    return {found["seed"]: found[figure] for found in rows if (found["row"], found["budget"]) == (row, budget)}


def _budgets(rows: Found) -> list[float]:
    return sorted({row["budget"] for row in rows if row["row"] != "full"}, reverse=True)
