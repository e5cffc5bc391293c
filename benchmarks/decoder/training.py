"""SDTP's predictors for a causal model: `PruneTrainer` on rows whose labels begin after the prompt, and their files."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoder.model import PROTECT, SALIENCY, Predictor, Subject
from benchmarks.decoder.recall import Recall
from benchmarks.decoder.texts import CORPORA, read_corpus
from benchmarks.training import arguments
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.errors import OptionError
from prunepass.training.data.metrics import IGNORED
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer

log = logging.getLogger(__name__)

#: rows of trained predictors, and whether they look at places
TRAINED = {"mlp": False, "mlp-positions": True}
#: weights of a plan's predictors, by row and seed
Trained = Mapping[tuple[str, int], Mapping[str, Tensor]]
#: statements in a row of recall
COUNTS = (1, 4)
_RECORD = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained; the model is frozen.

    Attributes:
        predictor: of every stage.
        budget: whose stages the predictors are trained at. They rank whatever is kept.
        select: share of the steps in which they also learn through soft choices what keeps the dense model's answers.
        bf16: compute in bfloat16 (automatic mixed precision).
    """

    predictor: Predictor = field(default_factory=Predictor)
    budget: float = 0.6
    steps: int = 240
    batch: int = 8
    learning_rate: float = 4e-3
    select: float = 0.0
    bf16: bool = False

    def of(self, row: str) -> Recipe:
        """For a row of `TRAINED`."""
        return replace(self, predictor=replace(self.predictor, positions=TRAINED[row]))


def train_all(subject: Subject, rows: Tensor, recipe: Recipe, seeds: Iterable[int]) -> Trained:
    """`train_predictors` for all of `TRAINED` and with each seed."""
    return {(row, seed): train_predictors(subject, rows, recipe.of(row), seed) for seed in seeds for row in TRAINED}


def train_predictors(
    subject: Subject, rows: Tensor, recipe: Recipe, seed: int, labels: Tensor | None = None
) -> Mapping[str, Tensor]:
    """Weights of a plan with a predictor before each block but the first.

    Args:
        rows: [N, P + C] ids. What a token of the first P is worth is what the C after it take from it.
        labels: [N, P + C], by default those C.
    """
    if labels is None:
        labels = rows.masked_fill(torch.arange(rows.shape[1]) < subject.prompt, IGNORED)
    chosen = subject.plan(ScorerSpec("mlp"), recipe.budget, recipe.predictor)
    plan = over_rows(chosen, subject.prompt, rows.shape[1])
    config = PruneConfig(
        Goal(share=recipe.budget),
        method="sdtp",
        plan=plan,
        predictor_width=recipe.predictor.width,
        predictor_positions=recipe.predictor.positions,
        predictor_learning_rate=recipe.learning_rate,
        freeze_model=True,
        gate_steps=recipe.select,
        saliency=SALIENCY,
    )
    model = copy.deepcopy(subject.model)
    model.config.use_cache = False  # a traced graph returns no cache
    data = [{"input_ids": row, "labels": wanted} for row, wanted in zip(rows, labels, strict=True)]
    with TemporaryDirectory() as folder:
        how = arguments(
            folder,
            batch=recipe.batch,
            log_every=recipe.steps // 10,
            max_steps=recipe.steps,
            seed=seed,
            bf16=recipe.bf16,
        )
        trainer = PruneTrainer(model, config, how, _stacked, data)
        trainer.train()
    log.info("predictors, seed %d: %s", seed, trainer.state.log_history[-2])
    trained = trainer.plan
    assert trained is not None
    return trained.weights


def over_rows(plan: PrunePlan, prompt: int, length: int) -> PrunePlan:
    """The plan for prompts as one for rows that go on: what comes after the prompt is protected, and kept besides."""
    rest = length - prompt
    local = ceil(PROTECT.last_share * prompt)
    stages = [Stage(s.layer, (ceil(s.keep * prompt) + rest) / length) for s in plan.stages]  # type: ignore[arg-type]  # made a fraction
    return replace(plan, stages=tuple(stages), protect=Protect(first=PROTECT.first, last=local + rest))


def _stacked(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows are equally long."""
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}


@dataclass(frozen=True)
class Pretrained:
    """The model's folder and what is in it.

    Args:
        folder: holds a Llama, its tokenizer and ``pretraining.json``.
    """

    folder: Path

    #: tokens of a prompt, and of what follows it, in what is measured
    prompt: ClassVar[int] = 256
    rest: ClassVar[int] = 128
    #: the same of the rows that predictors learn from
    learned_prompt: ClassVar[int] = 256
    learned_rest: ClassVar[int] = 128
    #: of `TRAINED`, those that are trained
    forms: ClassVar[tuple[str, ...]] = tuple(TRAINED)
    #: blocks before which stages stand; None for each but the first
    layers: ClassVar[tuple[int, ...] | None] = None

    def __post_init__(self) -> None:
        if not (self.folder / "pretraining.json").is_file():
            raise OptionError(
                f"There is no model in {self.folder}; make one with python -m benchmarks decoder-pretrain."
            )

    @cached_property
    def model(self) -> Any:
        """In float32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def measured(self) -> Any:
        """The model as it is measured."""
        return self.model

    @property
    def begin(self) -> int | None:
        """Id of the token that each row begins with; None where there is none."""
        return None

    def rows(self, corpora: Iterable[str], part: str, length: int) -> Tensor:
        """[N, length] ids: the running text of some corpora, cut into rows."""
        begin = [] if self.begin is None else [self.begin]
        ids, own = self.text(corpora, part), length - len(begin)
        return torch.tensor([begin + ids[i : i + own] for i in range(0, len(ids) - own + 1, own)])

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def recall(self) -> Recall:
        """Rows of recall in the tokenizer's words."""
        return Recall.of(self.tokenizer)

    @property
    def pretraining(self) -> dict[str, Any]:
        """How it was trained."""
        found: dict[str, Any] = json.loads((self.folder / "pretraining.json").read_text(encoding="utf-8"))
        return found

    def text(self, corpora: Iterable[str], part: str) -> list[int]:
        """Ids of all texts of some corpora, one after the other.

        Args:
            part: "train" or "test".
        """
        texts = chain.from_iterable(getattr(read_corpus(name), part) for name in corpora)
        ids: list[int] = self.tokenizer(" ".join(texts), add_special_tokens=False).input_ids
        return ids

    # -- predictors ----------------------------------------------------------------------------------------------------

    def train(self, recipe: Recipe, seeds: Sequence[int], rows: int) -> Path:
        """Train predictors of each form with each seed and keep them below the model's folder, which is given.

        Args:
            rows: that they learn from, half of them running text, half statements within text with questions after it.
        """
        folder = self.folder / "predictors"
        folder.mkdir(exist_ok=True)
        prompt, rest = self.learned_prompt, self.learned_rest
        ids, labels = self._rows(prompt, rest, rows)
        subject = Subject(self.model, prompt, self.layers)
        for seed in seeds:
            for form in self.forms:
                weights = train_predictors(subject, ids, recipe.of(form), seed, labels)
                save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{form}.{seed}.safetensors")
        record = {"steps": recipe.steps, "batch": recipe.batch, "learning_rate": recipe.learning_rate}
        record |= {"bf16": True} if recipe.bf16 else {}
        record |= {"budget": recipe.budget, "prompt": prompt, "rest": rest, "rows": rows, "seeds": len(seeds)}
        (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return folder

    def trained(self, seeds: Sequence[int], ways: Sequence[str] = tuple(TRAINED)) -> tuple[Trained, Mapping[str, Any]]:
        """Weights of the predictors that `train` kept, of those among ``ways``, and how they were trained.

        Raises:
            OptionError: there are none for a seed.
        """
        forms = [form for form in self.forms if form in ways]
        if not forms:
            return {}, {}
        files = {(form, s): self.folder / "predictors" / f"{form}.{s}.safetensors" for form in forms for s in seeds}
        if missing := [file for file in files.values() if not file.is_file()]:
            raise OptionError(f"There is no {missing[0]}; make it with python -m benchmarks decoder-predictors.")
        record = json.loads((self.folder / "predictors" / _RECORD).read_text(encoding="utf-8"))
        return {key: load_file(file) for key, file in files.items()}, record

    def _rows(self, prompt: int, rest: int, rows: int) -> tuple[Tensor, Tensor]:
        """(ids, labels), both [N, P + C]."""
        rng = random.Random(-2)
        texts = [self.text([name], "train") for name in CORPORA]
        ids, labels = [], []
        for i in range(rows):
            text = texts[i // 2 % len(texts)]
            start = rng.randrange(len(text) - prompt - rest)
            row = text[start : start + prompt + rest]
            wanted = row[prompt:]
            if i % 2:
                row, wanted = self._asked(rng, row[:prompt], rest)
            if self.begin is not None:
                row[0] = self.begin
            ids.append(row)
            labels.append([IGNORED] * prompt + wanted)
        return torch.tensor(ids), torch.tensor(labels)

    def _asked(self, rng: random.Random, text: list[int], rest: int) -> tuple[list[int], list[int]]:
        """A prompt of ``text`` with statements in it and ``rest`` tokens of questions about them, and the labels of
        these. In half of the rows the first question is the prompt's end already."""
        known = self.recall.statements(rng, rng.choice(COUNTS), text)
        asked = [rng.choice(known) for _ in range(rest)]
        tail = [i for key, value in asked for i in (*key, value, self.recall.stop)]
        labels = [i for key, value in asked for i in (*[IGNORED] * len(key), value, IGNORED)]
        seen = len(asked[0][0]) if rng.random() < 0.5 else 0
        context = self.recall.scattered(rng, known, text, len(text) - seen)
        return context + tail[: rest + seen], labels[seen : rest + seen]
