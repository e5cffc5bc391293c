"""The data sets: which file is trained on, which is held out, and which is tested on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.readers import (
    Example,
    read_columns,
    read_cranfield,
    read_newsgroups,
    read_squad,
    read_tagged_documents,
)

__all__ = ["SOURCES", "Source"]

Reader = Callable[[Path], list[Example]]

#: seed of every shuffle below: the splits are the same for all models and all runs
SEED = 0


@dataclass(frozen=True)
class Source:
    """A data set's splits, read from the folder of data sets. No split shares an example with another.

    Attributes:
        training: reads the examples to train on (and to hold out from).
        testing: reads the examples that figures are reported on.
        development: reads a file of its own to calibrate on, where the data set has one that isn't tested on.
        held_out: examples for calibration, at least.
        group: key of an example; those with the same value are held out together.
        testing_unit: key of an example; `every` counts within those with the same value.
    """

    training: Reader
    testing: Reader
    development: Reader | None = None
    held_out: int = 512
    group: str | None = None
    testing_unit: str | None = None

    def train(self, folder: Path) -> list[Example]:
        """Shuffled; without what `calibration` holds out."""
        return self._split(folder)[0]

    def calibration(self, folder: Path) -> list[Example]:
        """Shuffled; from the development file or the training file, never from what is tested."""
        return self._split(folder)[1]

    def test(self, folder: Path, every: int = 1) -> list[Example]:
        """Every ``every``-th example (of each unit), in the file's order, from the first."""
        kept, seen = [], dict[Any, int]()
        for example in self.testing(folder):
            unit = example[self.testing_unit] if self.testing_unit else None
            if seen.setdefault(unit, 0) % every == 0:
                kept.append(example)
            seen[unit] += 1
        return kept

    def _split(self, folder: Path) -> tuple[list[Example], list[Example]]:
        if self.development is not None:
            held_out = self._shuffled(self.development(folder))
            return self._shuffled(self.training(folder)), held_out[: self.held_out]
        examples = self._shuffled(self.training(folder))
        at = max(len(examples) - self.held_out, 0)
        while self.group and 0 < at < len(examples) and examples[at][self.group] == examples[at - 1][self.group]:
            at -= 1
        return examples[:at], examples[at:]

    def _shuffled(self, examples: list[Example]) -> list[Example]:
        """In a random order of the groups."""
        groups: dict[Any, list[Example]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(example[self.group] if self.group else i, []).append(example)
        order = list(groups.values())
        random.Random(SEED).shuffle(order)
        return [example for group in order for example in group]


# -- what each reads -------------------------------------------------------------------------------------------------


def _newsgroups(split: str) -> Reader:
    return lambda folder: read_newsgroups(folder / "20newsgroups_bydate" / "20news-bydate.tar.xz", split)


def _sst2(file: str, shortest: int = 0) -> Reader:
    """Sentences of so many words at least: the training file breaks most of its own into phrases, the others do not."""
    columns = {"text": 0, "label": 1}

    def read(folder: Path) -> list[Example]:
        rows = _labelled(read_columns(folder / "glue_sst2" / file, columns), ("0", "1"))
        return [row for row in rows if len(row["text"].split()) >= shortest]

    return read


def _mrpc(split: str) -> Reader:
    columns = {"text": 3, "second": 4, "label": 0}
    file = f"msr_paraphrase_{split}.txt"
    return lambda folder: _labelled(read_columns(folder / "mrpc" / file, columns), ("0", "1"))


def _rte(*files: str) -> Reader:
    columns = {"text": 1, "second": 2, "label": 3}

    def read(folder: Path) -> list[Example]:
        rows = [row for file in files for row in read_columns(folder / "rte_resplit" / file, columns)]
        return _labelled(rows, ("entailment", "not_entailment"))

    return read


def _stsb(file: str) -> Reader:
    columns = {"label": 4, "text": 5, "second": 6}

    def read(folder: Path) -> list[Example]:
        rows = read_columns(folder / "stsb" / file, columns, header=False)
        return [{**row, "label": float(row["label"])} for row in rows]

    return read


def _stsb_texts(file: str) -> Reader:
    """Both sentences of each pair, one after the other, as texts of their own; the first carries the score."""

    def read(folder: Path) -> list[Example]:
        texts = []
        for pair in _stsb(file)(folder):
            key = (pair["text"], pair["second"])
            texts += [
                {"text": pair["text"], "score": pair["label"], "pair": key},
                {"text": pair["second"], "pair": key},
            ]
        return texts

    return read


def _squad(*files: str) -> Reader:
    return lambda folder: read_squad([folder / "squad_v1.1" / file for file in files])


def _conll(file: str) -> Reader:
    return lambda folder: read_tagged_documents(folder / "conll2003" / file)


def _cranfield(folder: Path) -> list[Example]:
    return read_cranfield(folder / "cranfield" / "cranfield-dataset.tar.xz")


def _running_text(folder: Path) -> list[Example]:
    """Texts without labels, long and short, from training files of other tasks: posts, paragraphs and questions."""
    posts = [example["text"] for example in _newsgroups("train")(folder)[::4]]
    questions = _squad("train-subset-v1.1.json")(folder)
    paragraphs = list(dict.fromkeys(example["context"] for example in questions))
    return [{"text": text} for text in [*posts, *paragraphs, *(example["question"] for example in questions[::8])]]


def _labelled(rows: list[Example], names: tuple[str, ...]) -> list[Example]:
    return [{**row, "label": names.index(row["label"])} for row in rows]


#: by task. RTE is a split by others of GLUE's labelled rows, for GLUE's own test has no labels; its small development
#: file is trained on. Cranfield has no training file, so what is trained for it sees other texts.
SOURCES: dict[str, Source] = {
    "20newsgroups": Source(_newsgroups("train"), _newsgroups("test"), testing_unit="group"),
    "sst2": Source(_sst2("train.tsv", shortest=12), _sst2("dev.tsv")),
    "mrpc": Source(_mrpc("train"), _mrpc("test")),
    "stsb": Source(_stsb("sts-train.tsv"), _stsb("sts-test.tsv"), _stsb("sts-dev.tsv")),
    "rte": Source(_rte("train.tsv", "dev.tsv"), _rte("test.tsv"), held_out=256),
    "squad": Source(
        _squad("train-subset-v1.1.json"), _squad("dev-part1-v1.1.json", "dev-part2-v1.1.json"), group="context"
    ),
    "conll2003": Source(_conll("train.txt"), _conll("test.txt"), _conll("valid.txt")),
    "cranfield": Source(_running_text, _cranfield),
    "stsb-embedding": Source(
        _stsb_texts("sts-train.tsv"), _stsb_texts("sts-test.tsv"), _stsb_texts("sts-dev.tsv"), group="pair"
    ),
}
