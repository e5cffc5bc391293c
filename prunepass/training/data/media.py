"""What images and sound have in common: folders of files as examples, and models that make their tokens themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prunepass.errors import DataError, OptionError, option
from prunepass.training.data.heads import SAMPLE_MASK, Head, Kind
from prunepass.training.data.labels import label_reader
from prunepass.training.data.options import FLOPS, Source, TrainOptions
from prunepass.training.data.rows import Example, Examples

__all__ = ["MediaCollator", "Medium", "Tokens", "load_folder", "refuse_text_options", "tokens_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Medium:
    """One kind of file that a model reads.

    Attributes:
        one, many: its name in messages.
        endings: of files that are taken for it, in lower case; others are left out, and counted.
        opens: whether a file can be read, as far as its beginning shows.
    """

    one: str
    many: str
    endings: tuple[str, ...]
    opens: Callable[[Path], bool]


def load_folder(source: Source, head: Head, medium: Medium) -> Examples:
    """All files of a kind in a folder and the folders in it, by their paths. A classifier's labels are the names of the
    folders right below ``source``; files that lie in no such folder make it a folder without labels.

    Files of other kinds by the endings of their names, and files that cannot be read, are left out with a warning that
    counts them and names the first.

    Raises:
        DataError: there is no such folder, it holds no file of the kind, some files have a label and some have none, or
            a label is none of the model's.
        OptionError: an option that is for columns of text.
    """
    _refuse_columns(source, medium)
    folder = Path(source.name).expanduser()
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise DataError(f"The model reads {medium.many}: give a folder of them. {folder} {found}.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    paths = [path for path in files if path.suffix.lower() in medium.endings]
    others = [path for path in files if path.suffix.lower() not in medium.endings]
    if others:
        logger.warning(
            "%d files in %s are no %s by their names, and left out: first %s.",
            len(others), folder, medium.many, others[0],
        )  # fmt: skip
    broken = [path for path in paths if not medium.opens(path)]
    if broken:
        logger.warning(
            "%d %s in %s cannot be read, and are left out: first %s.", len(broken), medium.many, folder, broken[0]
        )
    bad = set(broken)
    paths = [path for path in paths if path not in bad]
    if not paths:
        raise DataError(f"{folder} holds no {medium.one} that can be read ({', '.join(medium.endings)}).")
    examples = tuple(_labelled(paths, folder, head, medium))
    return Examples(str(folder), examples, examples[0].label is not None)


@dataclass(frozen=True)
class Tokens:
    """How many tokens a model makes of an input.

    Attributes:
        name: of the input: ``"pixel_values"``, ``"input_values"``, ``"input_features"``.
        fixed: as many of each input; None where there are more of a longer waveform.
        convolutions: kernel and stride of those that make frames of a waveform.
    """

    name: str
    fixed: int | None
    convolutions: tuple[tuple[int, int], ...] = ()

    def of_samples(self, samples: Any) -> Any:
        """Of a waveform of so many samples: an int, or int64 tensors; below 1 where it is too short for a token."""
        if self.fixed is not None:
            return self.fixed
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1
        return samples

    def of_row(self, row: Mapping[str, Any]) -> int:
        """Of one row of a data set."""
        return self.fixed if self.fixed is not None else int(self.of_samples(len(row[self.name])))


def tokens_of(model: nn.Module, name: str, values: Tensor) -> Tokens:
    """How many tokens a model makes of inputs like this one, class and register tokens included. It runs once.

    Args:
        values: one input [...], without a batch: [channels, height, width] of an image, [samples] of a waveform, two
            axes of a spectrogram.

    Raises:
        OptionError: its encoder gives no state for each token, or frames of a waveform come about in another way than
            by the convolutions of its configuration.
    """
    made = _made(model, name, values[None])
    if values.dim() > 1:
        return Tokens(name, made)
    config = getattr(model, "config", None)
    kernels, strides = (getattr(config, f"conv_{part}", ()) for part in ("kernel", "stride"))
    found = Tokens(name, None, tuple(zip(kernels, strides, strict=True)))
    if found.of_samples(len(values)) != made:
        raise OptionError(
            f"{type(model).__name__} makes {made} tokens of {len(values)} samples, where the convolutions of its "
            f"configuration make {found.of_samples(len(values))}: which of them are live in a padded batch cannot be "
            "told. Models with an adapter after their encoder are not supported."
        )
    return found


def _made(model: nn.Module, name: str, values: Tensor) -> int:
    encoder = getattr(model, "base_model", model)
    reference = next(model.parameters())
    was_training = model.training
    model.eval()  # while it trains, a model of sound hides stretches of its input, which a short one may not have
    try:
        with torch.no_grad():
            found = encoder(**{name: values.to(reference.device, reference.dtype)}, output_hidden_states=True)
    finally:
        model.train(was_training)
    states = found.get("last_hidden_state")
    if states is None and found.get("hidden_states"):  # of a classifier whose encoder is no model of its own
        states = found["hidden_states"][-1]
    if states is None or states.dim() != 3:
        shape = "none" if states is None else tuple(states.shape)
        raise OptionError(
            f"{type(model).__name__} gives no [batch, tokens, width] of hidden states (last_hidden_state: {shape}), so "
            "it has no one row of tokens that could be pruned."
        )
    return int(states.shape[1])


@dataclass(frozen=True)
class MediaCollator:
    """Rows to batches.

    Rows with an ``attention_mask`` over their samples are padded with zeros to the longest one; others have one size.
    Batches say by ``attention_mask`` [B, tokens] int64 which tokens are live, which losses read and the model is not
    given. A mask over samples is ``sample_mask`` [B, samples] int64, and the model is given that.

    Attributes:
        tokens: that the model makes of an input.
        collate: how rows become batches; as above where left out.

    Raises:
        DataError: rows of one batch have several sizes, and no mask that says where each ends.
    """

    tokens: Tokens
    collate: Callable[[list[Any]], Mapping[str, Tensor]] | None = None

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """One batch of ``rows``."""
        batch = dict(self._stacked(rows) if self.collate is None else self.collate(rows))
        values, mask = batch[self.tokens.name], batch.pop("attention_mask", None)
        made = self.tokens.of_samples(values.shape[-1])
        live = torch.ones(len(values), made, dtype=torch.int64)
        if mask is not None and self.tokens.fixed is None:
            batch[SAMPLE_MASK] = mask
            live = (torch.arange(made) < self.tokens.of_samples(mask.sum(1))[:, None]).long()
        batch["attention_mask"] = live
        return batch

    def _stacked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        name = self.tokens.name
        values = [torch.as_tensor(row[name]) for row in rows]
        masks = [torch.as_tensor(row["attention_mask"]) for row in rows if "attention_mask" in row]
        batch: dict[str, Tensor] = {}
        if self.tokens.fixed is None and len(masks) == len(rows):
            batch = {name: pad_sequence(values, True), "attention_mask": pad_sequence(masks, True).long()}
        else:
            _check_sizes(name, values)
            batch[name] = torch.stack(values)
        if all("labels" in row for row in rows):
            batch["labels"] = torch.as_tensor([row["labels"] for row in rows])
        return batch


def _check_sizes(name: str, values: Sequence[Tensor]) -> None:
    sizes = sorted({tuple(x.shape) for x in values})
    if len(sizes) == 1:
        return
    said = ", ".join(map(str, sizes[:3]))
    if name == "pixel_values":
        raise DataError(
            f"The images of one batch are of several sizes ({said}). A traced model takes one: let the image processor "
            "crop or resize them."
        )
    raise DataError(
        f"The {name} of one batch are of several sizes ({said}). Cut or pad them to one; or, where the model reads an "
        "attention mask over samples, give each row an attention_mask of ones, as feature extractors with "
        "return_attention_mask=True do."
    )


def refuse_text_options(options: TrainOptions, many: str) -> None:
    """Raises `OptionError` for what means something for texts alone.

    Args:
        many: what the model reads: ``"images"`` or ``"sound files"``.
    """
    if options.protect_token_ids or options.protect_segment is not None or options.max_length is not None:
        names = ", ".join(option(name) for name in ("protect_token_ids", "protect_segment", "max_length"))
        raise OptionError(f"The model reads {many}, and {names} are for texts: leave them out.")
    if options.goal.target != FLOPS:
        raise OptionError(
            f"Budgets of models that read {many} are counted in FLOPs: leave {option('target')} out, and give a share."
        )


def _refuse_columns(source: Source, medium: Medium) -> None:
    for name in ("text", "pair", "label", "split", "quoting"):
        if getattr(source, name) is not None:
            raise OptionError(
                f"{option(name)} says how a table of texts is read, and the model reads {medium.many}: leave it out. "
                f"Labels of {medium.many} are the names of the folders that they lie in."
            )


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _labelled(paths: Sequence[Path], folder: Path, head: Head, medium: Medium) -> list[Example]:
    """Examples with labels where the head has classes and all files lie in a folder that names one."""
    names = [path.relative_to(folder).parts[:-1] for path in paths]
    if head.kind != Kind.CLASSIFICATION:
        return [Example(str(path)) for path in paths]
    bare = [path for path, parts in zip(paths, names, strict=True) if not parts]
    if bare and len(bare) < len(paths):
        raise DataError(
            f"{len(bare)} of the {len(paths)} {medium.many} in {folder} lie in no folder that names their class, first "
            f"{bare[0]}. Put each {medium.one} into the folder of its class, or all into one folder to learn without "
            "labels."
        )
    if bare:
        logger.warning(
            "The %s in %s lie in no folders that name their classes; only the unpruned model's own answers are "
            "learnt from.",
            medium.many,
            folder,
        )
        return [Example(str(path)) for path in paths]
    read = label_reader(head)
    return [Example(str(path), label=read(parts[0], str(path))) for path, parts in zip(paths, names, strict=True)]
