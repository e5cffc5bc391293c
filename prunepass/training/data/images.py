"""Folders of images as examples: opened when they are needed, through the model's own processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from prunepass.errors import DataError, MissingExtraError
from prunepass.training.data.heads import Head
from prunepass.training.data.media import Medium, load_folder
from prunepass.training.data.options import Source
from prunepass.training.data.rows import Example, Examples

__all__ = ["Images", "load_images"]

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images(Dataset[dict[str, Any]]):
    """Images as a model takes them. Each is read from its file when it is asked for, and not kept.

    Attributes:
        rows: paths (``Example.text``) with their labels.
        processor: an image processor of transformers, or what is called like one.
        max_length: tokens that the model makes of an image.
        cut: 0, as nothing of an image is left out; for records.
    """

    rows: tuple[Example, ...] = field(repr=False)
    processor: Any = field(repr=False)
    max_length: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``pixel_values`` [channels, height, width] floating, and ``labels`` where there are some.

        Raises:
            DataError: the file cannot be read any more, or only in part.
        """
        example = self.rows[index]
        values = self.processor(images=_opened(Path(str(example.text))), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": values} | ({} if example.label is None else {"labels": example.label})

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [self.max_length] * len(self.rows)


def load_images(source: Source, head: Head) -> Examples:
    """All images of a folder and the folders in it; see `load_folder`.

    Raises:
        DataError, OptionError: see `load_folder`.
        MissingExtraError: pillow is not installed.
    """
    return load_folder(source, head, Medium("image", "images", _ENDINGS, _opens))


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise MissingExtraError("pillow", "images", "Reading images") from None
    return PIL


def _opens(path: Path) -> bool:
    """Whether the file is an image whose beginning can be read. All of it is read when it is needed."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            image.verify()
    except Exception:  # a broken file raises whatever its reader met: SyntaxError, struct.error, OSError, ...
        return False
    return True


def _opened(path: Path) -> Any:
    """RGB, upright: cameras write pictures lying on their side, and say so."""
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            return pillow.ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # a broken file raises whatever its reader met
        raise DataError(f"The image {path} cannot be read: {e}. Repair it, or take it out of the folder.") from None
