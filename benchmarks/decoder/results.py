"""Where records are kept, and the runs that make them, of stories260K and of what the command pretrain wrote."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.places import REPOSITORY, data_folder
from benchmarks.decoder.llama2c import read_model, read_tokenizer
from benchmarks.decoder.predictors import Recipe, train_all
from benchmarks.decoder.pretrained import Pretrained
from benchmarks.decoder.rows import measure
from benchmarks.decoder.shortened import WINDOW, measure_caches
from benchmarks.decoder.subject import Subject
from benchmarks.decoder.texts import CORPORA, read_corpus
from benchmarks.records import write

__all__ = ["FOLDER", "PROMPT", "read", "run_caches", "run_stories", "run_texts", "story_rows"]

log = logging.getLogger(__name__)

FOLDER = REPOSITORY / "benchmarks" / "results" / "decoder"
PACKAGES = ("torch", "transformers", "tokenizers")
#: tokens of a prompt, and of what follows it; together within the model's context of 512
PROMPT, CONTINUATION = 256, 128


def run_stories(seeds: int, recipe: Recipe, rows: int, batch: int, folder: Path = FOLDER) -> Path:
    """Train predictors for stories260K and measure all rows; writes ``stories260K.json`` and gives its path."""
    subject, train, test = _stories()
    started = time.perf_counter()
    record: dict[str, Any] = {
        "model": "stories260K",
        "prompt": PROMPT,
        "continuation": CONTINUATION,
        "prompts": rows,
        "training": asdict(recipe) | {"rows": len(train)},
        "versions": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "rows": [],
    }
    weights = train_all(subject, train, recipe, range(seeds))
    for found in measure(subject, weights, test, range(seeds), recipe, rows, batch):
        record["rows"].append(found)
        record["seconds"] = round(time.perf_counter() - started)
        path = write(folder / f"{record['model']}.json", record)
    return path


def run_texts(model: Path, seeds: int, rows: int, batch: int, folder: Path = FOLDER) -> list[Path]:
    """Measure a model that the command pretrain wrote on each corpus; writes ``<model's name>.<corpus>.json``."""
    pretrained = Pretrained(model)
    subject = Subject(pretrained.model, PROMPT)
    weights, training = pretrained.trained(range(seeds))
    length, paths = PROMPT + CONTINUATION, []
    for corpus in CORPORA:
        ids = torch.tensor(pretrained.text([corpus], "test"))
        test = ids[: len(ids) // length * length].view(-1, length)
        record: dict[str, Any] = {
            "model": f"{model.name}: {corpus}",
            "prompt": PROMPT,
            "continuation": CONTINUATION,
            "prompts": rows,
            "training": training,
            "versions": {name: version(name) for name in PACKAGES},
            "threads": torch.get_num_threads(),
            "rows": [],
        }
        for found in measure(subject, weights, test, range(seeds), Recipe(), rows, batch):
            record["rows"].append(found)
            path = write(folder / f"{model.name}.{corpus}.json", record)
        paths.append(path)
    return paths


def run_caches(seeds: int, recipe: Recipe, rows: int, batch: int, folder: Path = FOLDER) -> Path:
    """Measure caches that are cut after the prompt; writes ``stories260K.cache.json`` and gives its path."""
    subject, train, test = _stories()
    record: dict[str, Any] = {
        "model": "stories260K",
        "prompt": PROMPT,
        "continuation": CONTINUATION,
        "prompts": rows,
        "window": WINDOW,
        "training": asdict(recipe) | {"rows": len(train)},
        "versions": {name: version(name) for name in PACKAGES},
        "cache": [],
    }
    for found in measure_caches(subject, train, test, range(seeds), recipe, rows, batch):
        record["cache"].append(found)
        path = write(folder / f"{record['model']}.cache.json", record)
    return path


def _stories() -> tuple[Subject, Tensor, Tensor]:
    """The model, and rows to learn from and to test on."""
    checkpoint = data_folder() / "stories260K"
    tokenizer = read_tokenizer(checkpoint / "tok512.bin")
    corpus = read_corpus("stories")
    train, test = (story_rows(tokenizer, texts) for texts in (corpus.train, corpus.test))
    return Subject(read_model(checkpoint / "stories260K.bin"), PROMPT), train, test


def story_rows(tokenizer: Any, stories: Sequence[str]) -> Tensor:
    """[N, P + C] ids: the beginnings of the stories that are long enough."""
    length = PROMPT + CONTINUATION
    rows = ([tokenizer.bos_token_id, *tokenizer(story).input_ids] for story in stories)
    return torch.tensor([row[:length] for row in rows if len(row) >= length])


def read(folder: Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The records at hand: of measured ``rows``, of ``cache``, of ``recall`` or of ``speed``."""
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))
