"""Examples for training and calibration, from files or data sets by name, checked against a model's head."""

from __future__ import annotations

import difflib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Protocol

from prunepass.errors import DataError, option
from prunepass.plan.annotations import Segment
from prunepass.training.data.files import Row, Table, read_table
from prunepass.training.data.heads import Head, Kind
from prunepass.training.data.labels import Answer, Label, label_reader
from prunepass.training.data.options import Source

__all__ = ["Example", "Examples", "Rows", "check_count", "compare_labels", "load_examples", "train_eval_split"]

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
#: one part of a pair is short where its texts have at most this share of the characters of the other's
_SHORT = 1 / 3
_LABELS = {
    Kind.CLASSIFICATION: ("label", "labels", "class", "category", "target"),
    Kind.MULTI_LABEL: ("labels", "label", "classes", "categories"),
    Kind.REGRESSION: ("score", "label", "labels", "similarity", "target"),
    Kind.TOKEN_CLASSIFICATION: ("ner_tags", "pos_tags", "tags", "labels", "label"),
    Kind.QUESTION_ANSWERING: ("answers", "answer", "answer_text"),
}
#: fewer examples are refused; so few are warned of
LEAST = 8
_FEW = 100


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
        columns: what was read from which column: text, pair, label.
    """

    name: str
    rows: tuple[Example, ...]
    labelled: bool
    columns: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def choose(self, count: int, seed: int) -> Examples:
        """``count`` of the examples drawn at random, in their order; all of them where there are no more."""
        chosen = sorted(random.Random(seed).sample(range(len(self)), min(count, len(self))))
        return self._only(chosen)

    @property
    def pairs(self) -> bool:
        """Whether examples have two texts."""
        return any(row.pair is not None for row in self.rows)

    def short_part(self) -> Segment | None:
        """The part of pairs that is short beside the other: a question beside its passage, a hypothesis beside its
        premise. None where both are of a kind, or examples have one text."""
        pairs = [(len(row.text), len(row.pair)) for row in self.rows if row.pair is not None]
        if not pairs:
            return None
        first, second = (median(lengths) for lengths in zip(*pairs, strict=True))
        if first <= _SHORT * second:
            return "first"
        return "second" if second <= _SHORT * first else None

    def _only(self, places: Iterable[int]) -> Examples:
        return replace(self, rows=tuple(self.rows[i] for i in places))


class Rows(Protocol):
    """Examples as a model takes them: of texts, images or sound."""

    @property
    def max_length(self) -> int:
        """The most tokens a row has."""
        ...

    @property
    def cut(self) -> int:
        """How many examples were longer, and lost their end."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


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
        logger.warning("%s has no label column; the unpruned model's own answers stand in for labels.", table.name)
    read = None if label is None else label_reader(head, table.class_names.get(label, ()))
    of = _words if head.kind == Kind.TOKEN_CLASSIFICATION else _text
    rows, empty = [], []
    for row in table.rows:
        if _is_empty(row, text, pair):
            empty.append(row.place)
            continue
        example = Example(of(row, text), None if pair is None else _text(row, pair))
        if read is not None and label is not None:
            example = replace(example, label=read(_label_value(row, label, head), row.place))
            _check_fit(example, row.place)
        rows.append(example)
    if empty and not rows:
        raise DataError(f"All {len(empty)} texts in {table.name} are empty.")
    if empty:
        logger.warning("%d rows without text are left out, the first in %s.", len(empty), empty[0])
    roles = {"text": text, "pair": pair, "label": label}
    examples = Examples(
        table.name, tuple(rows), label is not None, {role: name for role, name in roles.items() if name is not None}
    )
    _warn_of_one_class(examples, head)
    return examples


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


def check_count(train: Examples, evaluation: Examples) -> None:
    """Refuse what is too little to learn from, and warn of figures that say little.

    Raises:
        DataError: there are fewer than `LEAST` examples to train on.
    """
    if len(train) < LEAST:
        raise DataError(
            f"{train.name} leaves {len(train)} examples to train on, of which nothing can be learned: give {LEAST} at "
            "least, better some hundreds."
        )
    if len(train) < _FEW:
        logger.warning("%s leaves %d examples to train on; some hundreds are better.", train.name, len(train))
    if len(evaluation) < _FEW:
        logger.warning("Figures on %d examples say little; %s names others.", len(evaluation), option("eval_data"))


def compare_labels(train: Examples, evaluation: Examples, head: Head) -> None:
    """Warn of classes that only one of the two has."""
    if head.kind != Kind.CLASSIFICATION or not (train.labelled and evaluation.labelled):
        return
    known, asked = ({row.label for row in rows} for rows in (train, evaluation))
    strange = sorted(head.labels[int(label)] for label in asked - known if isinstance(label, int))
    if strange:
        logger.warning(
            "The data to report on have classes that the data to train on do not: %s.", ", ".join(strange[:10])
        )


def _warn_of_one_class(examples: Examples, head: Head) -> None:
    if head.kind != Kind.CLASSIFICATION or not examples.labelled or len(examples) < LEAST:
        return
    counts = Counter(row.label for row in examples)
    if len(counts) == 1:
        (label,) = counts
        assert isinstance(label, int)
        logger.warning(
            "All %d labels in %s are %r: accuracy and f1 will say nothing.", len(examples), examples.name,
            head.labels[label],
        )  # fmt: skip


# -- columns ---------------------------------------------------------------------------------------------------------


def _text_columns(table: Table, source: Source, head: Head) -> tuple[str, str | None]:
    named = (_named(table, source.text, "text"), _named(table, source.pair, "pair"))
    if head.kind == Kind.TOKEN_CLASSIFICATION:
        if named[1] is not None:
            raise DataError(f"A head that labels tokens takes one text, no pair; leave {option('pair')} out.")
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
        near = difflib.get_close_matches(column.casefold(), _by_usual_name(table), n=1)
        guess = f" Did you mean {_by_usual_name(table)[near[0]]!r}?" if near else ""
        raise DataError(f"{table.name} has no column {column!r} for the {role}; it has {_columns(table)}.{guess}")
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
            f"{_columns(table)}. Say which one it is ({option(role, 'COLUMN')})."
        )
    return found


def _label_column(table: Table, source: Source, head: Head, taken: set[str | None]) -> str | None:
    usual = _LABELS.get(head.kind, ())
    if source.label is None:
        have = _by_usual_name(table)
        return next((have[name] for name in usual if name in have and have[name] not in taken), None)
    if not usual:
        raise DataError(f"The model's head ({head.kind}) learns from no labels; leave {option('label')} out.")
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


def _is_empty(row: Row, text: str, pair: str | None) -> bool:
    """Whether one of the texts is empty or white space."""
    values = (row.values.get(column) for column in (text, pair) if column is not None)
    return any(isinstance(value, str) and not value.strip() for value in values)


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
