"""Running text, split into what is trained on and what is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.places import data_folder
from prunepass.errors import OptionError

_STORY_END = "<|endoftext|>"
#: one essay, or story, in so many is tested on
_EVERY = 5


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind; none is in both parts."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def read_corpus(name: str) -> Corpus:
    """One of `CORPORA`, from the benchmark's data folder.

    WikiText-2's validation file is trained on, as its training file is not among the data, and its test file tested on.

    Raises:
        OptionError: there is no such corpus, or its files are missing.
    """
    if name not in CORPORA:
        raise OptionError(f"There is no corpus {name!r}; choose one of {', '.join(CORPORA)}.")
    folder = data_folder() / CORPORA[name]
    if not folder.is_dir():
        raise OptionError(f"The corpus {name} is read from {folder}, which is not there.")
    if name == "wikitext":
        return Corpus(name, *((_text(folder / file),) for file in ("valid.txt", "test.txt")))
    if name == "essays":
        return _split(name, [_text(file) for file in sorted(folder.glob("*.txt")) if file.name != "SOURCE.txt"])
    return _split(name, [story.strip() for story in _text(folder / "tinystories_sample.txt").split(_STORY_END)[:-1]])


#: folder of each corpus
CORPORA = {"stories": "tinystories_sample", "wikitext": "wikitext2", "essays": "paul_graham_essays"}


def _split(name: str, texts: list[str]) -> Corpus:
    tested = [text for i, text in enumerate(texts) if i % _EVERY == 0]
    return Corpus(name, tuple(text for i, text in enumerate(texts) if i % _EVERY), tuple(tested))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
