"""Lets an image model adapt to a plan, on photographs without labels: it learns its own unpruned vectors."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.images.photographs import coloured, pixels
from benchmarks.training import arguments
from prunepass import PrunePlan
from prunepass.errors import OptionError
from prunepass.training.data.options import Goal
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.trainer import PruneTrainer

__all__ = ["Views", "adapt"]

_ENDINGS = (".jpg", ".jpeg", ".png")
_SHARES = (0.4, 1.0)  # of the area that a view shows


@dataclass(frozen=True)
class Views(Dataset[dict[str, Tensor]]):
    """Rectangles of photographs, some mirrored, with brightness and colours changed. Row i is always the same view.

    Args:
        folder: of photographs, and the folders in it.
        count: rows.

    Raises:
        OptionError: there are no photographs.
    """

    folder: Path
    count: int

    def __post_init__(self) -> None:
        if not self._files():
            raise OptionError(f"{self.folder} holds no photographs (files ending in {', '.join(_ENDINGS)}).")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        files, rng = self._files(), random.Random(index)
        image = Image.open(files[index % len(files)]).convert("RGB")
        side = rng.uniform(*_SHARES) ** 0.5
        width, height = (max(1, round(length * side)) for length in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        view = image.crop((left, top, left + width, top + height))
        view = coloured(ImageOps.mirror(view) if rng.random() < 0.5 else view, rng)
        return {"pixel_values": pixels([view])[0]}

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.suffix.lower() in _ENDINGS)


def adapt(
    model: Any,
    plan: PrunePlan,
    folder: Path,
    *,
    steps: int,
    batch: int = 16,
    learning_rate: float = 5e-6,
    seed: int = 0,
) -> Any:
    """``model``, trained in place to answer under ``plan`` as it did without.

    The loss is the cosine distance of the mean vector and of the class token's, and of the kept tokens' states
    in each block. ToP's form of training: the scorer of the plan has no weights, and all steps adapt the model.
    """
    transformers.set_seed(seed)
    with TemporaryDirectory() as output:
        how = arguments(
            output,
            batch=batch,
            log_every=max(1, steps // 50),
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=steps // 20,
            seed=seed,
        )
        scorer: Any = plan.scorer.to_json()
        config = PruneConfig(Goal(share=0.5), method="top", scorer=scorer, plan=plan, hidden_weight=3.0)
        PruneTrainer(model, config, how, None, Views(folder, steps * batch)).train()
    return model.eval()
