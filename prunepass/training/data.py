"""Examples for training and calibration, from files or data sets by name, checked against a model's head."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prunepass.errors import DataError
from prunepass.training.files import Row, Table, read_table
from prunepass.training.heads import Head, Kind
from prunepass.training.labels import Answer, Label, label_reader
from prunepass.training.options import Source

__all__ = ["Example", "Examples", "load_examples", "train_eval_split"]

logger = logging.getLogger(__name__)

# Usual names, tried in this order, whatever their case.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "context"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
)
_TEXTS = ("text", "sentence", "document", "content", "body", "review", "question", "query", "sentence1", "premise")
_WORDS = ("tokens", "words")
_LABELS = {
    Kind.CLASSIFICATION: ("label", "labels", "class", "category", "target"),
    Kind.MULTI_LABEL: ("labels", "label", "classes", "categories"),
    Kind.REGRESSION: ("score", "label", "labels", "similarity", "target"),
    Kind.TOKEN_CLASSIFICATION: ("ner_tags", "pos_tags", "tags", "labels", "label"),
    Kind.QUESTION_ANSWERING: ("answers", "answer", "answer_text"),
}
_OPTIONS = {"text": "--text", "pair": "--pair", "label": "--label"}


@dataclass(frozen=True)
class Example:
    """One text with what is to be predicted.

    Attributes:
        text: the text, or its words where the head labels tokens; the question where it answers questions.
        pair: the second text; the context of a question.
        label: None where there is none.
    """

    text: str | tuple[str, ...]
    pair: str | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Examples:
    """Examples of one source.

    Attributes:
        name: of the source, for messages.
        labelled: whether each of them has a label.
    """

    name: str
    rows: tuple[Example, ...]
    labelled: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def choose(self, count: int, seed: int) -> Examples:
        """``count`` of the examples drawn at random, in their order; all of them where there are no more."""
        chosen = sorted(random.Random(seed).sample(range(len(self)), min(count, len(self))))
        return self._only(chosen)

    def _only(self, places: Iterable[int]) -> Examples:
        return replace(self, rows=tuple(self.rows[i] for i in places))


def load_examples(source: Source | str, head: Head) -> Examples:
    """Read ``source`` and check it against ``head``. A head without labels, or data without them, is fine.

    Raises:
        DataError: the source cannot be read, is empty, lacks a column, or holds a text or label that cannot be.
    """
    source = Source(source) if isinstance(source, str) else source
    table = read_table(source)
    text, pair = _text_columns(table, source, head)
    label = _label_column(table, source, head, {text, pair})
    if label is None and head.kind in _LABELS:
        logger.warning("%s has no label column; only the unpruned model's own answers are learnt from.", table.name)
    read = None if label is None else label_reader(head, table.class_names.get(label, ()))
    of = _words if head.kind == Kind.TOKEN_CLASSIFICATION else _text
    rows = []
    for row in table.rows:
        example = Example(of(row, text), None if pair is None else _text(row, pair))
        if read is not None and label is not None:
            example = replace(example, label=read(_label_value(row, label, head), row.place))
            _check_fit(example, row.place)
        rows.append(example)
    return Examples(table.name, tuple(rows), label is not None)


def train_eval_split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """``examples`` without a random ``share`` of them, and that share: at least one example each.

    Raises:
        DataError: there are fewer than two, or the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise DataError(f"The share held out must lie between 0 and 1, not {share}.")
    if len(examples) < 2:
        raise DataError(f"{examples.name} has {len(examples)} example; to hold some out takes at least 2.")
    held = min(len(examples) - 1, max(1, round(share * len(examples))))
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    return examples._only(sorted(order[held:])), examples._only(sorted(order[:held]))


# -- columns ---------------------------------------------------------------------------------------------------------


def _text_columns(table: Table, source: Source, head: Head) -> tuple[str, str | None]:
    named = (_named(table, source.text, "text"), _named(table, source.pair, "pair"))
    if head.kind == Kind.TOKEN_CLASSIFICATION:
        if named[1] is not None:
            raise DataError("A head that labels tokens takes one text, no pair; leave the pair out.")
        return named[0] or _guessed(table, _WORDS, "text"), None
    if named == (None, None) and head.kind in _LABELS:  # other heads read one text at a time
        pair = _guessed_pair(table)
        if pair is not None:
            return pair
    text = named[0] or _guessed(table, _TEXTS, "text", but=named[1])
    if named[1] is None and head.kind == Kind.QUESTION_ANSWERING:
        return text, _guessed(table, ("context", "passage", "paragraph"), "pair", but=text)
    return text, named[1]


def _named(table: Table, column: str | None, role: str) -> str | None:
    if column is not None and column not in table.columns:
        raise DataError(f"{table.name} has no column {column!r} for the {role}; it has {_columns(table)}.")
    return column


def _guessed_pair(table: Table) -> tuple[str, str] | None:
    have = _by_usual_name(table)
    return next(((have[one], have[two]) for one, two in _PAIRS if one in have and two in have), None)


def _guessed(table: Table, usual: tuple[str, ...], role: str, *, but: str | None = None) -> str:
    have = _by_usual_name(table)
    found = next((have[name] for name in usual if name in have and have[name] != but), None)
    if found is None:
        raise DataError(
            f"{table.name} has no column with a usual name for the {role} ({', '.join(usual)}); it has "
            f"{_columns(table)}. Say which one it is ({_OPTIONS[role]} COLUMN)."
        )
    return found


def _label_column(table: Table, source: Source, head: Head, taken: set[str | None]) -> str | None:
    usual = _LABELS.get(head.kind, ())
    if source.label is None:
        have = _by_usual_name(table)
        return next((have[name] for name in usual if name in have and have[name] not in taken), None)
    if not usual:
        raise DataError(f"The model's head ({head.kind}) learns from no labels; leave {_OPTIONS['label']} out.")
    return _named(table, source.label, "label")


def _by_usual_name(table: Table) -> dict[str, str]:
    return {column.strip().casefold(): column for column in table.columns}


def _columns(table: Table) -> str:
    return ", ".join(repr(column) for column in table.columns)


# -- values ----------------------------------------------------------------------------------------------------------


def _value(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if value is None:
        raise DataError(f"There is no {column!r} in {row.place}.")
    return value


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} in {row.place} is not text, but {value!r}.")
    return value


def _words(row: Row, column: str) -> tuple[str, ...]:
    value = _value(row, column)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise DataError(f"{column!r} in {row.place} must be a list of words, or text with spaces, not {value!r}.")
    return tuple(words)


def _label_value(row: Row, column: str, head: Head) -> Any:
    """The label as it stands there; of an answer in two columns of its own (CSV), both."""
    value = _value(row, column)
    if head.kind == Kind.QUESTION_ANSWERING and "answer_start" in row.values:
        return {"text": value, "answer_start": row.values["answer_start"]}
    return value


def _check_fit(example: Example, place: str) -> None:
    label = example.label
    if isinstance(example.text, tuple) and isinstance(label, tuple) and len(label) != len(example.text):
        raise DataError(f"There are {len(example.text)} words in {place}, but {len(label)} labels; each needs one.")
    if isinstance(label, Answer) and not (example.pair or "").startswith(label.text, label.start):
        raise DataError(
            f"The answer {label.text!r} does not stand at character {label.start} of its context ({place})."
        )
