"""Folders of images as examples: found and checked, opened when they are needed, through the model's own processor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from prunepass.errors import DataError, MissingExtraError, OptionError, option
from prunepass.training.data.features import Features
from prunepass.training.data.heads import Head, Kind
from prunepass.training.data.labels import label_reader
from prunepass.training.data.options import FLOPS, Source, TrainOptions
from prunepass.training.data.rows import Example, Examples

__all__ = ["Images", "Rows", "image_collator", "load_images", "refuse_text_options", "tokens_made"]

logger = logging.getLogger(__name__)

#: files that are taken for images; others are left out, and counted
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


#: what a model is trained and measured on
Rows: TypeAlias = Features | Images


def load_images(source: Source, head: Head) -> Examples:
    """All images of a folder and the folders in it, by their paths. A classifier's labels are the names of the folders
    right below ``source``; images that lie in no such folder make it a folder without labels.

    Files that are no images by the endings of their names, and images that cannot be opened, are left out with a
    warning that counts them and names the first.

    Raises:
        DataError: there is no such folder, it holds no image, some images have a label and some have none, or a label
            is none of the model's.
        MissingExtraError: pillow is not installed.
        OptionError: an option that is for columns of text.
    """
    _refuse_columns(source)
    folder = Path(source.name).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise DataError(f"The model reads images: give a folder of them. {folder} {found}.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    paths = [path for path in files if path.suffix.lower() in _ENDINGS]
    others = [path for path in files if path.suffix.lower() not in _ENDINGS]
    if others:
        logger.warning(
            "%d files in %s are no images by their names, and left out: first %s.", len(others), folder, others[0]
        )
    broken = [path for path in paths if not _opens(path)]
    if broken:
        logger.warning("%d images in %s cannot be read, and are left out: first %s.", len(broken), folder, broken[0])
    bad = set(broken)
    paths = [path for path in paths if path not in bad]
    if not paths:
        raise DataError(f"{folder} holds no image that can be read ({', '.join(_ENDINGS)}).")
    examples = tuple(_labelled(paths, folder, head))
    return Examples(str(folder), examples, examples[0].label is not None)


def image_collator(
    tokens: int, collate: Callable[[list[Any]], Mapping[str, Tensor]] | None = None
) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Images of one size to batches.

    Args:
        tokens: that the model makes of an image. Batches say of all that they are live: ``attention_mask`` [B, tokens]
            int64, which losses read and the model is not given.
        collate: how rows become batches; stacked where left out.

    Raises:
        DataError: images of one batch have several sizes.
    """

    def collated(rows: list[Any]) -> dict[str, Tensor]:
        batch = dict(_stacked(rows) if collate is None else collate(rows))
        batch["attention_mask"] = torch.ones(len(batch["pixel_values"]), tokens, dtype=torch.int64)
        return batch

    return collated


def tokens_made(model: nn.Module, pixel_values: Tensor) -> int:
    """How many tokens a model makes of an image of that size, class and register tokens included.

    Args:
        pixel_values: [1, channels, height, width].

    Raises:
        OptionError: its encoder gives no state for each token.
    """
    encoder = getattr(model, "base_model", model)
    reference = next(model.parameters())
    with torch.no_grad():
        found = encoder(pixel_values=pixel_values.to(reference.device, reference.dtype))
    states = found.get("last_hidden_state")
    if states is None or states.dim() != 3:
        shape = "none" if states is None else tuple(states.shape)
        raise OptionError(
            f"{type(model).__name__} gives no [batch, tokens, width] of hidden states (last_hidden_state: {shape}), so "
            "it has no one row of tokens that could be pruned."
        )
    return int(states.shape[1])


def _stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    pixels = [torch.as_tensor(row["pixel_values"]) for row in rows]
    sizes = sorted({tuple(x.shape) for x in pixels})
    if len(sizes) > 1:
        raise DataError(
            f"The images of one batch are of several sizes ({', '.join(map(str, sizes[:3]))}). A traced model takes "
            "one: let the image processor crop or resize them."
        )
    batch = {"pixel_values": torch.stack(pixels)}
    if all("labels" in row for row in rows):
        batch["labels"] = torch.as_tensor([row["labels"] for row in rows])
    return batch


def refuse_text_options(options: TrainOptions) -> None:
    """Raises `OptionError` for what means something for texts alone."""
    if options.protect_token_ids or options.protect_segment is not None or options.max_length is not None:
        names = ", ".join(option(name) for name in ("protect_token_ids", "protect_segment", "max_length"))
        raise OptionError(f"The model reads images, and {names} are for texts: leave them out.")
    if options.goal.target != FLOPS:
        raise OptionError(
            f"Budgets of models that read images are counted in FLOPs: leave {option('target')} out, and give a share."
        )


def _refuse_columns(source: Source) -> None:
    for name in ("text", "pair", "label", "split", "quoting"):
        if getattr(source, name) is not None:
            raise OptionError(
                f"{option(name)} says how a table of texts is read, and the model reads images: leave it out. Labels "
                "of images are the names of the folders that they lie in."
            )


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


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


def _labelled(paths: Sequence[Path], folder: Path, head: Head) -> list[Example]:
    """Examples with labels where the head has classes and all images lie in a folder that names one."""
    names = [path.relative_to(folder).parts[:-1] for path in paths]
    if head.kind != Kind.CLASSIFICATION:
        return [Example(str(path)) for path in paths]
    bare = [path for path, parts in zip(paths, names, strict=True) if not parts]
    if bare and len(bare) < len(paths):
        raise DataError(
            f"{len(bare)} of the {len(paths)} images in {folder} lie in no folder that names their class, first "
            f"{bare[0]}. Put each image into the folder of its class, or all into one folder to learn without labels."
        )
    if bare:
        logger.warning(
            "The images in %s lie in no folders that name their classes; only the unpruned model's own answers are "
            "learnt from.",
            folder,
        )
        return [Example(str(path)) for path in paths]
    read = label_reader(head)
    return [Example(str(path), label=read(parts[0], str(path))) for path, parts in zip(paths, names, strict=True)]
