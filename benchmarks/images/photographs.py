"""Photographs as pixel values: whole, and cut, mirrored and recoloured as queries for them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from prunepass.errors import OptionError

__all__ = ["SIZE", "coloured", "cut_out", "files_in", "photographs", "pixels", "queries"]

SIZE = 224
_ENDINGS = (".jpg", ".jpeg", ".png")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as the model was trained


def photographs(folder: Path, count: int) -> list[Image.Image]:
    """Photographs of a folder at even distances in the order of their names, RGB, as they are.

    Raises:
        OptionError: the folder holds fewer.
    """
    files = files_in(folder)
    if len(files) < count:
        raise OptionError(f"{folder} holds {len(files)} photographs, fewer than the {count} asked for.")
    chosen = [files[i * len(files) // count] for i in range(count)]
    return [Image.open(file).convert("RGB") for file in chosen]


def files_in(folder: Path) -> list[Path]:
    """Those of photographs in a folder and the folders in it, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS)


def pixels(images: list[Image.Image]) -> Tensor:
    """[N, 3, 224, 224] float32: the middle square of each."""
    squares = [ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    values = torch.stack([torch.from_numpy(np.array(square)) for square in squares]).permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (_MEAN, _DEVIATION))
    return (values - mean) / deviation


def queries(images: list[Image.Image], share: float = 0.6, seed: int = 0) -> list[Image.Image]:
    """Of each photograph a rectangle of this share of its area, mirrored, with brightness and colours changed."""
    rng = random.Random(seed)
    made = []
    for image in images:
        made.append(coloured(ImageOps.mirror(cut_out(image, share, rng)), rng))
    return made


def cut_out(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """A rectangle of this share of the image's area, of its shape, anywhere."""
    width, height = (max(1, round(side * share**0.5)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def coloured(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with its brightness, contrast and colours each changed by up to 40 %."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.6, 1.4))
    return image
