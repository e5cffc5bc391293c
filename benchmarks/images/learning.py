"""Lets an image model adapt to a plan, on photographs without labels: it learns its own unpruned vectors."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.images.photographs import coloured, cut_out, files_in, pixels
from benchmarks.training import arguments
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer

__all__ = ["Views", "adapt"]

_SHARES = (0.4, 1.0)  # of the area that a view shows


class Views(Dataset[dict[str, Tensor]]):
    """Rectangles of photographs, some mirrored, with brightness and colours changed. Row i is always the same view.

    Args:
        folder: of photographs, and the folders in it.
        count: rows.

    Raises:
        OptionError: there are no photographs.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._files, self._count = files_in(folder), count
        if not self._files:
            raise OptionError(f"{folder} holds no photographs. Name a folder of .jpg or .png files.")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(index)
        image = Image.open(self._files[index % len(self._files)]).convert("RGB")
        view = cut_out(image, rng.uniform(*_SHARES), rng)
        view = coloured(ImageOps.mirror(view) if rng.random() < 0.5 else view, rng)
        return {"pixel_values": pixels([view])[0]}


def adapt(model: Any, plan: PrunePlan, folder: Path, *, steps: int, batch: int = 16) -> None:
    """Train ``model`` in place to answer under ``plan`` as it did without.

    The loss is the cosine distance of the mean vector and of the class token's, and of the kept tokens' states
    in each block. ToP's form of training: the scorer of the plan has no weights, and all steps adapt the model.
    """
    with TemporaryDirectory() as output:
        how = arguments(
            output,
            batch=batch,
            log_every=steps // 50,
            max_steps=steps,
            learning_rate=5e-6,  # at 3e-5 the loss of DINOv2-small rises
            warmup_steps=steps // 20,
        )
        config = PruneConfig(Goal(share=0.5), method="top", plan=plan, hidden_weight=3.0)
        PruneTrainer(model, config, how, None, Views(folder, steps * batch)).train()
    model.eval()
