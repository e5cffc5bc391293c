"""Spoken sentences with their words, and the share of words that a transcript has wrong."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prunepass.errors import OptionError

__all__ = ["RATE", "Clip", "clips", "word_edits", "words"]

#: samples a second that Whisper takes
RATE = 16_000


@dataclass(frozen=True)
class Clip:
    """One sentence.

    Attributes:
        sound: [samples] float32 in -1 to 1, `RATE` a second.
        words: what is said, as `words` gives it.
    """

    sound: npt.NDArray[np.float32]
    words: list[str]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.sound) / RATE


def clips(folder: Path, count: int) -> list[Clip]:
    """Clips at even distances in the order of their names.

    Args:
        folder: laid out as LJSpeech: ``wavs/NAME.wav`` (16 bits, one channel, any rate) and a file ``metadata*.csv`` of
            lines ``NAME|text as written|text as read``.

    Raises:
        OptionError: there is no such file, or there are fewer clips.
    """
    texts = sorted(folder.glob("metadata*.csv"))
    if not texts:
        raise OptionError(f"{folder} holds no metadata*.csv. Give a folder laid out as LJSpeech.")
    lines = (line.split("|") for line in texts[0].read_text(encoding="utf-8").splitlines())
    said = {line[0]: words(line[-1]) for line in lines}
    files = sorted(file for file in (folder / "wavs").glob("*.wav") if file.stem in said)
    if len(files) < count:
        raise OptionError(f"{folder} holds {len(files)} clips with a text, fewer than the {count} asked for.")
    return [Clip(_sound(file), said[file.stem]) for file in (files[i * len(files) // count] for i in range(count))]


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return str(BasicTextNormalizer()(text)).split()


def word_edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """How many words must be changed, left out or put in to get from one to the other (Levenshtein's distance)."""
    before = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        now = [i]
        for j, other in enumerate(heard, 1):
            now.append(min(before[j] + 1, now[j - 1] + 1, before[j - 1] + (word != other)))
        before = now
    return before[-1]


def _sound(file: Path) -> npt.NDArray[np.float32]:
    from scipy.signal import resample_poly

    with wave.open(str(file)) as stream:
        if (stream.getsampwidth(), stream.getnchannels()) != (2, 1):
            raise OptionError(f"{file} has not 16 bits and one channel. Convert it first.")
        rate, samples = stream.getframerate(), np.frombuffer(stream.readframes(stream.getnframes()), "<i2")
    common = math.gcd(RATE, rate)
    sound = resample_poly(samples.astype(np.float32) / 32768, RATE // common, rate // common)
    return np.asarray(sound, np.float32)
