"""How all benchmarks run transformers' Trainer: nothing saved, nothing reported, on the GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from prunepass.training.loop.arguments import has_bf16


def bf16_pays() -> bool:
    """Whether bf16 autocast is faster than float32 here: on a GPU, and on CPUs that have kernels for it.

    With AVX2 alone a product of matrices takes ten times as long in bf16 (torch 2.13, AMD EPYC).
    """
    return torch.cuda.is_available() or has_bf16()


def arguments(folder: str | Path, *, batch: int, log_every: int, **more: Any) -> transformers.TrainingArguments:
    """Arguments of a Trainer; ``more`` are its own."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        logging_steps=max(1, log_every),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
