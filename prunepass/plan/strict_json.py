"""Text into JSON data and data into a plan's parts, strictly: what is not understood is an error that names it."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from prunepass.errors import PlanError
from prunepass.plan.values import shown

__all__ = ["from_mapping", "parse", "unknown_key"]

#: a plan that protects a hundred thousand ids needs less than one
MAX_BYTES = 16 * 10**6
_MAX_DIGITS = 40


def parse(text: str) -> Any:
    """The data of a JSON text.

    Raises:
        PlanError: it is no JSON, too large or too deep, holds a key twice, or a number that JSON has no form for.
    """
    if not isinstance(text, str):
        raise PlanError(f"A plan's JSON is text, not {type(text).__name__}.")
    if len(text) > MAX_BYTES:
        raise PlanError(f"The text is {len(text) / 1e6:.0f} million characters long, which no plan is.")
    if not text.strip():
        raise PlanError("The plan is not valid JSON: it is empty.")
    try:
        return json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_no_number,
        )
    except PlanError:
        raise
    except RecursionError:
        raise PlanError("The plan is not valid JSON: lists or objects are nested too deep in it.") from None
    except ValueError as e:
        raise PlanError(f"The plan is not valid JSON: {e}.") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise PlanError(f"The plan has the key {shown(twice)} twice in one object. Remove one of them.")
    return found


def _whole_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise PlanError(f"The plan holds a number of {len(text)} digits, which no field of it takes.")
    return int(text)


def _number(text: str) -> float:
    if len(text) > 10 * _MAX_DIGITS:
        raise PlanError(f"The plan holds a number of {len(text)} characters, which no field of it takes.")
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise PlanError(f"The plan holds the number {text}, which is too large for any field of it.")
    return value


def _no_number(text: str) -> NoReturn:
    raise PlanError(f"The plan holds {text}, which is no number of JSON.")


def from_mapping(cls: Any, data: Any, where: str, **more: Any) -> Any:
    """``cls(**data, **more)`` with an error that names the wrong key and the nearest right one, or the missing one.

    Args:
        cls: a dataclass.
        data: what a user wrote; keys of ``more`` are unknown there.
        where: for messages.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} must be a JSON object, not {shown(data)}.")
    known = [f for f in fields(cls) if f.name not in more]
    for key in data:
        if key not in [f.name for f in known]:
            raise PlanError(unknown_key(key, [f.name for f in known], where))
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in data]:
        raise PlanError(f"{where} lacks {', '.join(missing)}.")
    return cls(**data, **more)


def unknown_key(key: Any, known: Sequence[str], where: str) -> str:
    """The message for an unknown key: what it is, the nearest known name, and all of them."""
    near = difflib.get_close_matches(str(key)[:100], known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown key {shown(key)} in {where}.{guess} Known: {', '.join(known)}."
