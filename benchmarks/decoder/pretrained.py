"""A model that `benchmarks.decoder.pretrain` wrote, with predictors trained once for all that is asked of it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoder.predictors import TRAINED, Recipe, Trained, train_predictors
from benchmarks.decoder.recall import Recall
from benchmarks.decoder.subject import Subject
from benchmarks.decoder.texts import CORPORA, read_corpus
from prunepass.errors import OptionError
from prunepass.training.data.metrics import IGNORED

__all__ = ["COUNTS", "Pretrained"]

log = logging.getLogger(__name__)

#: statements in a row of recall
COUNTS = (1, 4)
_RECORD = "recipe.json"


@dataclass(frozen=True)
class Pretrained:
    """The model's folder and what is in it.

    Args:
        folder: holds a Llama, its tokenizer and ``pretraining.json``.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "pretraining.json").is_file():
            raise OptionError(f"There is no model in {self.folder}; make one with the command pretrain.")

    @cached_property
    def model(self) -> Any:
        """In float32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

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

    def train(self, recipe: Recipe, seeds: Sequence[int], prompt: int, rest: int, rows: int) -> Path:
        """Train predictors of each form with each seed and keep them below the model's folder, which is given.

        Args:
            prompt, rest: tokens of a row, and of those how many come after its prompt.
            rows: that they learn from, half of them running text, half statements within text with questions after it.
        """
        folder = self.folder / "predictors"
        folder.mkdir(exist_ok=True)
        ids, labels = self._rows(prompt, rest, rows)
        subject = Subject(self.model, prompt)
        for seed in seeds:
            for form in TRAINED:
                weights = train_predictors(subject, ids, recipe.of(form), seed, labels)
                save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{form}.{seed}.safetensors")
        record = {"steps": recipe.steps, "batch": recipe.batch, "learning_rate": recipe.learning_rate}
        record |= {"budget": recipe.budget, "prompt": prompt, "rest": rest, "rows": rows, "seeds": len(seeds)}
        (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return folder

    def trained(self, seeds: Sequence[int]) -> tuple[Trained, Mapping[str, Any]]:
        """Weights of the predictors that `train` kept, and how they were trained.

        Raises:
            OptionError: there are none for a seed.
        """
        files = {(form, s): self.folder / "predictors" / f"{form}.{s}.safetensors" for form in TRAINED for s in seeds}
        if missing := [file for file in files.values() if not file.is_file()]:
            raise OptionError(f"There is no {missing[0]}; make it with the command predictors.")
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
