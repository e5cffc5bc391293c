"""Labels as files have them, turned into what a head learns from. Errors say the row, the value and what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunepass.errors import DataError
from prunepass.training.data.heads import Head, Kind

__all__ = ["Answer", "Label", "label_reader"]


@dataclass(frozen=True)
class Answer:
    """The part of a context that answers a question: its first character, and its text. No answer: an empty text."""

    start: int
    text: str


#: class; number or numbers; class of each word, or yes (1.0) or no (0.0) for each class; answer
Label = int | float | tuple[int, ...] | tuple[float, ...] | Answer


def label_reader(head: Head, class_names: Sequence[str] = ()) -> Callable[[Any, str], Label]:
    """A function from a value of the label column, and its row's place in words, to a label for ``head``.

    Args:
        class_names: names that the data set itself has for its numbers. Where the model knows them all, they decide:
            its order may be another.
    """
    if head.kind == Kind.REGRESSION:
        return lambda value, place: _numbers(value, place, max(1, len(head.labels)))
    if head.kind == Kind.QUESTION_ANSWERING:
        return _answer
    one = _class_reader(head.labels, class_names)
    if head.kind == Kind.TOKEN_CLASSIFICATION:
        return lambda value, place: tuple(one(v, place) for v in _list(value, place, " "))
    if head.kind == Kind.MULTI_LABEL:
        return lambda value, place: _yes_or_no(value, place, one, len(head.labels))
    return one


# -- classes ---------------------------------------------------------------------------------------------------------


def _class_reader(labels: Sequence[str], class_names: Sequence[str]) -> Callable[[Any, str], int]:
    ids = {name: i for i, name in enumerate(labels)}
    folded = {name.casefold(): i for i, name in enumerate(labels)}
    renumbered = bool(class_names) and all(name.casefold() in folded for name in class_names)

    def read(value: Any, place: str) -> int:
        if isinstance(value, str) and value.strip() in ids:
            return ids[value.strip()]
        if isinstance(value, str) and value.strip().casefold() in folded:
            return folded[value.strip().casefold()]
        number = _whole(value)
        if number is None:
            raise DataError(f"The label {value!r} in {place} is none of the model's: {_listed(labels)}.")
        if renumbered and 0 <= number < len(class_names):
            return folded[class_names[number].casefold()]
        if not 0 <= number < len(labels):
            raise DataError(
                f"The label {number} in {place} is out of range: the model has {len(labels)} classes, 0 to "
                f"{len(labels) - 1} ({_listed(labels)})."
            )
        return number

    return read


def _whole(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _yes_or_no(value: Any, place: str, one: Callable[[Any, str], int], count: int) -> tuple[float, ...]:
    """Names or numbers of the classes that hold; or, as floats, a yes (1.0) or no (0.0) for each class."""
    values = _list(value, place, "|")
    if len(values) == count and all(isinstance(v, float) for v in values):
        if not set(values) <= {0.0, 1.0}:
            raise DataError(f"The labels in {place} must be 0.0 or 1.0 for each class, not {values}.")
        return tuple(values)
    chosen = {one(v, place) for v in values}
    return tuple(float(i in chosen) for i in range(count))


def _list(value: Any, place: str, separator: str) -> list[Any]:
    """A list; or text: a JSON list, or items between separators."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        raise DataError(f"The labels in {place} must be a list, not {value!r}.")
    if value.lstrip().startswith("["):
        return list(_json(value, place))
    return [item for item in value.split(separator) if item.strip()]


# -- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(value: Any, place: str, count: int) -> float | tuple[float, ...]:
    if count == 1:
        return _number(value, place)
    values = tuple(_number(v, place) for v in _list(value, place, " "))
    if len(values) != count:
        raise DataError(f"The label in {place} has {len(values)} numbers; the model predicts {count}.")
    return values


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The label {value!r} in {place} is not a number, which the model's regression head predicts.")
    return number


# -- answers ---------------------------------------------------------------------------------------------------------


def _answer(value: Any, place: str) -> Answer:
    """SQuAD's ``{"text": [...], "answer_start": [...]}``, or a list of single answers. The first one counts."""
    if isinstance(value, str):
        value = _json(value, place)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else {"text": (), "answer_start": ()}
    if not isinstance(value, Mapping) or "text" not in value or "answer_start" not in value:
        raise DataError(f"The answers in {place} must have a text and an answer_start, as in SQuAD, not {value!r}.")
    text, start = _only(value["text"]), _only(value["answer_start"])
    if text is None or start is None:
        return Answer(0, "")
    whole = _whole(start)
    if not isinstance(text, str) or whole is None or whole < 0:
        raise DataError(f"The answer in {place} must be text and the number of its first character, not {value!r}.")
    return Answer(whole, text)


def _only(value: Any) -> Any:
    """The first of a list, None of an empty one, or the value itself."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"The label in {place} is not valid JSON: {e.msg}.") from None
