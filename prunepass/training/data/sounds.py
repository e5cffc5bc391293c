"""Folders of sound as examples: read and resampled when they are needed, through the model's own feature extractor."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from prunepass.errors import DataError, MissingExtraError, OptionError, option
from prunepass.training.data.heads import Head
from prunepass.training.data.media import Medium, Tokens, load_folder, tokens_of
from prunepass.training.data.options import Source
from prunepass.training.data.rows import Example, Examples

__all__ = ["Reader", "Sounds", "build_sounds", "load_sounds"]

logger = logging.getLogger(__name__)

#: of files that libsndfile reads
_ENDINGS = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
#: waveforms are cut to this many seconds, unless more are asked for: about as many tokens as texts have at most
DEFAULT_SECONDS = 10.0
#: shorter clips are left out: two windows of a spectrogram, or two frames of wav2vec2
_SHORTEST = 0.05


@dataclass(frozen=True)
class Reader:
    """How the sound of one model is read.

    Attributes:
        extractor: a feature extractor of transformers; its ``sampling_rate`` is that of all samples here.
        name: of the model's input, which the extractor makes.
        limit: samples that clips are cut to.
        pads: whether shorter clips are filled with silence up to ``limit``, as the model knows no mask over samples.
    """

    extractor: Any = field(repr=False)
    name: str
    limit: int
    pads: bool = False

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    def samples(self, path: Path) -> int:
        """Of a file, resampled and not cut."""
        info = _soundfile().info(str(path))
        return -(-int(info.frames) * self.rate // int(info.samplerate))

    def read(self, path: Path) -> dict[str, Tensor]:
        """The model's input, without a batch: floating [samples] or a spectrogram's two axes. Where the extractor makes
        a mask over samples, ``attention_mask`` [samples] of ones beside it.

        Raises:
            DataError: the file cannot be read, or holds values that are no numbers.
        """
        made = self.extractor(_heard(path, self.rate, self.limit), sampling_rate=self.rate, return_tensors="pt")
        values = made[self.name][0]
        if self.pads:
            values = F.pad(values, (0, self.limit - len(values)))
        masked = values.dim() == 1 and not self.pads and "attention_mask" in made
        return {self.name: values} | ({"attention_mask": torch.ones(len(values), dtype=torch.int64)} if masked else {})


@dataclass(frozen=True)
class Sounds(Dataset[dict[str, Any]]):
    """Sound as a model takes it. Each clip is read from its file when it is asked for, and not kept.

    Attributes:
        rows: paths (``Example.text``) with their labels.
        lengths: tokens that the model makes of each clip.
        cut: how many clips were longer than the reader's limit and lost their end.
    """

    rows: tuple[Example, ...] = field(repr=False)
    reader: Reader
    lengths: list[int] = field(repr=False)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `Reader.read` gives, and ``labels`` where there are some.

        Raises:
            DataError: the file cannot be read any more, or only in part.
        """
        example = self.rows[index]
        row: dict[str, Any] = self.reader.read(Path(str(example.text)))
        return row | ({} if example.label is None else {"labels": example.label})

    @property
    def max_length(self) -> int:
        """The most tokens a clip has."""
        return max(self.lengths)


def load_sounds(source: Source, head: Head) -> Examples:
    """All sound files of a folder and the folders in it; see `load_folder`.

    Raises:
        DataError, OptionError: see `load_folder`.
        MissingExtraError: soundfile or scipy is not installed.
    """
    _soundfile(), _resample_poly()  # before a file is looked at
    return load_folder(source, head, Medium("sound file", "sound files", _ENDINGS, _opens))


def build_sounds(
    model: nn.Module,
    name: str,
    extractor: Any,
    examples: Sequence[Examples],
    max_seconds: float | None = None,
) -> tuple[list[Sounds], Tokens]:
    """Files as the model takes them, cut to one number of seconds: those to train on first, then others.

    Spectrograms have one size, as their extractor pads them. Waveforms keep their lengths where the extractor makes a
    mask over samples (``return_attention_mask``); else all are filled with silence up to the same length. Clips of less
    than .05 seconds, and waveforms too short for a token, are left out with a warning.

    Args:
        name: of the model's input.
        max_seconds: the most of a clip that is read. Where left out, what a model of spectrograms takes; of waveforms
            the longest one in the first examples, and at most `DEFAULT_SECONDS`.

    Raises:
        OptionError: the extractor makes no input of that name, or spectrograms of several sizes; the model takes fewer
            seconds, or they are fewer than .1; see `tokens_of`.
        DataError: no clip is long enough, or one cannot be read.
    """
    rate, least = int(extractor.sampling_rate), 2 * _SHORTEST
    if max_seconds is not None and max_seconds < least:
        raise OptionError(f"{option('max_seconds')} must be at least {least:g}, not {max_seconds:g}.")
    asked = DEFAULT_SECONDS if max_seconds is None else max_seconds
    reader = Reader(extractor, name, max(1, round(rate * asked)))
    counts = [[reader.samples(Path(str(row.text))) for row in one] for one in examples]
    longest = max(range(len(counts[0])), key=counts[0].__getitem__)
    if counts[0][longest] < least * rate:
        raise DataError(f"All sound files in {examples[0].name} are shorter than {least:g} seconds.")
    example = _example(reader, Path(str(examples[0].rows[longest].text)))
    tokens = tokens_of(model, name, example)
    if example.dim() > 1:
        most = _most_seconds(extractor)
        if max_seconds is not None and most is not None and max_seconds > most:
            raise OptionError(
                f"The model takes {most:g} seconds at most; {option('max_seconds')} asks for {max_seconds:g}."
            )
        # of an extractor that does not say how much it takes, it cuts what is too long
        seconds = max_seconds or most or max(map(max, counts)) / rate
        reader = Reader(extractor, name, max(1, round(rate * seconds)))
    else:
        limit = reader.limit if max_seconds is not None else min(reader.limit, counts[0][longest])
        reader = Reader(extractor, name, limit, pads=not getattr(extractor, "return_attention_mask", False))
    return [_sounds(one, reader, tokens, n) for one, n in zip(examples, counts, strict=True)], tokens


def _sounds(examples: Examples, reader: Reader, tokens: Tokens, counts: Sequence[int]) -> Sounds:
    limit = reader.limit
    made = [tokens.of_samples(limit if reader.pads else min(n, limit)) for n in counts]
    kept = [i for i, count in enumerate(made) if count >= 1 and counts[i] >= _SHORTEST * reader.rate]
    if not kept:
        raise DataError(f"No sound file in {examples.name} is long enough for the model.")
    if len(kept) < len(made):
        logger.warning(
            "%d sound files in %s are too short for the model, and are left out.", len(made) - len(kept), examples.name
        )
    cut = sum(counts[i] > limit for i in kept)
    if cut:
        logger.warning(
            "%d of the %d sound files in %s are longer than %g seconds and were cut; a larger %s, where the model "
            "takes more, reads more of them.",
            cut, len(kept), examples.name, limit / reader.rate, option("max_seconds"),
        )  # fmt: skip
    return Sounds(tuple(examples.rows[i] for i in kept), reader, [made[i] for i in kept], cut)


def _example(reader: Reader, path: Path) -> Tensor:
    """What the extractor makes of a clip, checked."""
    heard = _heard(path, reader.rate, reader.limit)
    made = [
        reader.extractor(sound, sampling_rate=reader.rate, return_tensors="pt")
        for sound in (heard, heard[: len(heard) // 2])
    ]
    if reader.name not in made[0]:
        raise OptionError(
            f"The model reads {reader.name}, and {type(reader.extractor).__name__} makes {', '.join(made[0])}: they do "
            "not belong together. Save the model's own feature extractor in its folder."
        )
    values, shorter = (one[reader.name][0] for one in made)
    if values.dim() > 1 and values.shape != shorter.shape:
        raise OptionError(
            f"{type(reader.extractor).__name__} makes spectrograms as long as their clips, {tuple(values.shape)} and "
            f"{tuple(shorter.shape)} of two. Those of one size alone can be trained on, such as AST's and Whisper's."
        )
    return torch.as_tensor(values)


def _most_seconds(extractor: Any) -> float | None:
    """How long a clip may be until the extractor of spectrograms cuts it; None where it does not say."""
    chunk = getattr(extractor, "chunk_length", None)  # Whisper's, in seconds
    if chunk:
        return float(chunk)
    frames = getattr(extractor, "max_length", None)  # AST's, each of 25 ms, 10 ms apart
    return None if frames is None else (frames - 1) * 0.010 + 0.025


# -- files -----------------------------------------------------------------------------------------------------------


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, and libsndfile is not
        raise MissingExtraError("soundfile", "audio", "Reading sound") from None
    return soundfile


def _resample_poly() -> Any:
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise MissingExtraError("scipy", "audio", "Reading sound") from None
    return resample_poly


def _opens(path: Path) -> bool:
    """Whether the file is sound whose beginning can be read, and not empty. All of it is read when it is needed."""
    try:
        return int(_soundfile().info(str(path)).frames) > 0
    except (RuntimeError, OSError):  # soundfile's own errors are RuntimeErrors
        return False


def _heard(path: Path, rate: int, limit: int) -> NDArray[np.float32]:
    """The first samples of a file, at most ``limit`` of them at ``rate`` a second: float32, one channel, the mean of
    all."""
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(str(path)) as file:
            own = int(file.samplerate)
            found = file.read(-(-limit * own // rate), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as e:
        raise DataError(f"The sound file {path} cannot be read: {e} Repair it, or take it out of the folder.") from None
    sound = found.mean(axis=1, dtype=np.float32)
    if not len(sound) or not np.isfinite(sound).all():
        what = "values that are no numbers" if len(sound) else "no samples"
        raise DataError(f"The sound file {path} holds {what}. Repair it, or take it out of the folder.")
    if own != rate:
        common = math.gcd(own, rate)
        sound = _resample_poly()(sound, rate // common, own // common)
    return np.asarray(sound[:limit], np.float32)
