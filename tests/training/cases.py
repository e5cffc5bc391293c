"""Tiny models and data that the tests of training share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

import zoo
from harness import captured
from prunepass.cost.blocks import BlockCosts
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer

Row = dict[str, Any]


def rows(count: int = 48, head: str = "sequence", seed: int = 0) -> list[Row]:
    """Random texts of 6 to 30 tokens with labels that fit a head of `zoo.tiny`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    made = []
    for _ in range(count):
        ids = draw(4, zoo.VOCABULARY, draw(6, 31)[0])
        row: Row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if head == "sequence":
            row["labels"] = int(ids[3] > zoo.VOCABULARY // 2)
        elif head == "regression":
            row["labels"] = ids[3] / zoo.VOCABULARY
        elif head == "token":
            row["labels"] = [i % 2 for i in ids]
        elif head in ("masked", "causal"):
            row["labels"] = list(ids)
        elif head == "question":
            row["start_positions"], row["end_positions"] = 1, 3
        made.append(row)
    return made


def collate(batch: list[Row]) -> dict[str, Tensor]:
    """Pads to a multiple of eight; labels of tokens with -100."""
    width = -(-max(len(row["input_ids"]) for row in batch) // 8) * 8
    fill = {"input_ids": zoo.PAD, "attention_mask": 0, "labels": -100}

    def padded(name: str, value: Any) -> Any:
        return value + [fill[name]] * (width - len(value)) if isinstance(value, list) else value

    return {name: torch.tensor([padded(name, row[name]) for row in batch]) for name in batch[0]}


def trainer(
    folder: Path,
    *,
    name: str = "bert",
    head: str = "sequence",
    steps: int = 10,
    share: float = 0.5,
    arguments: dict[str, Any] | TrainingArguments | None = None,
    model: Any = None,
    data: list[Row] | None = None,
    teacher: Any = None,
    calibration: list[Row] | None = None,
    optimizer_cls_and_kwargs: Any = None,
    **prune: Any,
) -> PruneTrainer:
    """A trainer on the CPU, in float32, that logs each step and writes nothing unless asked to.

    Args:
        arguments: some that differ from these, or a whole ``TrainingArguments``.
    """
    # a geometric schedule is there at once; a search takes as long as all else together
    options: dict[str, Any] = {"max_evaluations": 20, "calibration_rows": 16}
    if prune.get("method", "both") == "both":
        options["search"] = "spread"
    given = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    made, costs = model, None
    if made is None:
        costs = _costs(name, "sequence" if head == "regression" else head, prune.get("method", "both"))
        extra = {"num_labels": 1, "problem_type": "regression"} if head == "regression" else {}
        made = zoo.tiny(name, "sequence" if head == "regression" else head, dtype=torch.float32, **extra)
    return PruneTrainer(
        made,
        PruneConfig(Goal(share=share), **(options | prune)),
        arguments
        if isinstance(arguments, TrainingArguments)
        else TrainingArguments(output_dir=str(folder), **(given | (arguments or {}))),
        data_collator=collate,
        train_dataset=data or rows(head=head),
        eval_dataset=rows(16, head, seed=1),
        teacher=teacher,
        costs=costs,
        calibration_dataset=calibration,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


@cache
def _costs(name: str, head: str, method: str) -> BlockCosts:
    """Counted once a model: it takes longer than a training of ten steps."""
    if method == "top":
        return BlockCosts.of(captured(name, head))
    return BlockCosts.of(captured(name, head), scorer="norm").with_predictor(zoo.HIDDEN, 32)
