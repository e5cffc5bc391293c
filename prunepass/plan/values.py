"""Single values of a plan, read strictly: numbers, whole numbers, flags and options. Each error is one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

from prunepass.errors import PlanError

__all__ = ["MAX_DENOMINATOR", "as_flag", "as_fraction", "as_index", "as_json", "as_list", "as_options", "shown"]

MAX_DENOMINATOR = 10**4
#: whole numbers of a plan are compared with lengths and token ids, for which runtimes have 32 bits
_MAX_INDEX = 2**31 - 1
#: a number as text; more would take a while to read, and no share needs it
_MAX_CHARACTERS = 200
_MAX_EXPONENT = 400
_MAX_BITS = 1 << 16
_MAX_DEPTH = 8
_SHOWN = 80


def shown(value: Any) -> str:
    """``repr(value)`` for a message: one line of at most some eighty characters, whatever the value."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as a whole number of more digits than Python prints, or a structure too deep
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}... ({len(text)} characters)"


def as_fraction(value: Any, name: str) -> Fraction:
    """An exact fraction from an int, a float (by its shortest decimal form: 0.1 is 1/10), text ("7/10") or Fraction.

    Numbers of numpy and `decimal` are taken as well. Held to the nearest fraction with a denominator of at most ten
    thousand.

    Raises:
        PlanError: it is no finite number, or its text is longer than any share needs.
    """
    exact = None if isinstance(value, bool) else _exact(value)
    if exact is None:
        raise PlanError(f"{name} must be a number such as 0.5 or '1/2', not {shown(value)}.")
    # counts must be exact in every runtime's arithmetic (`plan_counts`), and 0.3333333333333333 means 1/3
    return exact.limit_denominator(MAX_DENOMINATOR)


def _exact(value: Any) -> Fraction | None:
    if isinstance(value, Rational):  # whole numbers, those of numpy too
        above, below = int(value.numerator), int(value.denominator)
        return Fraction(above, below) if max(above.bit_length(), below.bit_length()) <= _MAX_BITS else None
    if isinstance(value, (Real, Decimal)):
        return _read(str(value))
    return _read(value) if isinstance(value, str) else None


def _read(text: str) -> Fraction | None:
    exponent = re.search(r"[eE]([+-]?[\d_]+)\s*$", text) if len(text) <= _MAX_CHARACTERS else None
    if len(text) > _MAX_CHARACTERS or (exponent and abs(int(exponent[1])) > _MAX_EXPONENT):
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def as_index(value: Any, name: str) -> int:
    """A whole number from 0 to 2^31 - 1; those of numpy are taken. Raises `PlanError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise PlanError(f"{name} must be a whole number of at least 0, not {shown(value)}.")
    if int(value) > _MAX_INDEX:
        raise PlanError(f"{name} must be at most {_MAX_INDEX}, not {shown(value)}.")
    return int(value)


def as_flag(value: Any, name: str) -> bool:
    """True or False; those of numpy are taken. Raises `PlanError` for anything else, text such as "false" included."""
    plain = value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value
    if not isinstance(plain, bool):
        raise PlanError(f"{name} must be true or false, not {shown(value)}.")
    return plain


def as_list(value: Any, name: str, what: str) -> list[Any]:
    """The elements of a list, a tuple, a range or an array of one dimension.

    Raises:
        PlanError: text, a mapping, a set, whose order means nothing, or what has no elements.
    """
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:
        return list(value.tolist())
    if isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable):
        raise PlanError(f"{name} must be a list of {what}, not {shown(value)}.")
    return list(value)


def as_options(value: Any, name: str, depth: int = 0) -> Any:
    """A scorer's option as JSON takes it; lists become tuples.

    Raises:
        PlanError: a value that JSON has no form for (NaN, an object), a whole number beyond 64 bits, or lists in lists
            in lists without end.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral) and int(value).bit_length() < 64:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Rational) and math.isfinite(value):
        return float(value)
    if depth < _MAX_DEPTH and isinstance(value, (list, tuple)):
        return tuple(as_options(v, name, depth + 1) for v in value)
    if depth < _MAX_DEPTH and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: as_options(v, name, depth + 1) for k, v in value.items()}
    raise PlanError(f"{name} must be plain data (numbers, text, true, false, lists, mappings), not {shown(value)}.")


def as_json(option: Any) -> Any:
    """What `as_options` gave, with lists in place of tuples, as it comes back from JSON."""
    if isinstance(option, tuple):
        return [as_json(v) for v in option]
    return {k: as_json(v) for k, v in option.items()} if isinstance(option, dict) else option
