"""Options that are declared once: a field of a dataclass says name, type, default, what it is for, and what it may be.

The command line takes its flags, defaults and help from the same fields (`prunepass.cli.flags`)::

    @dataclass(frozen=True)
    class Options:
        epochs: Annotated[float, Declared("Passes over the data.", check=positive)] = 2.0

        def __post_init__(self) -> None:
            check(self)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from prunepass.errors import OptionError, option

__all__ = ["Declared", "at_least", "check", "declared", "each_at_least", "not_below_zero", "one_of", "positive"]

#: raises `OptionError` for a value that cannot be, of the option of this name
Check = Callable[[str, Any], None]


@dataclass(frozen=True)
class Declared:
    """What one field is, beside its name, type and default.

    Attributes:
        help: what it is for, in one or two sentences.
        flags: on the command line; ``--name`` with dashes where left out.
        metavar: makes it an argument, by this name, in place of a flag.
        check: of every value but None.
        parse: makes the value out of the text on the command line, where its type is not one that is read as it stands.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    check: Check | None = None
    parse: Callable[[str], Any] | None = None


@functools.cache
def declared(kind: type) -> Mapping[str, tuple[Any, Declared | None]]:
    """Of each field of a dataclass its type and its declaration, where it has one."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: _apart(hints[f.name]) for f in fields(kind)}


def _apart(hint: Any) -> tuple[Any, Declared | None]:
    if get_origin(hint) is not Annotated:
        return hint, None
    inner, *extras = get_args(hint)
    return inner, next((extra for extra in extras if isinstance(extra, Declared)), None)


def check(options: Any, like: type | None = None) -> None:
    """Raises `OptionError` for the first field whose value cannot be.

    Args:
        like: the class that declares the fields; those of ``options`` that have their names are checked.
    """
    for name, (_, said) in declared(like or type(options)).items():
        value = getattr(options, name, None)
        if said is not None and said.check is not None and value is not None:
            said.check(name, value)


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{option(name)} must be a number above 0, not {value}.")


def not_below_zero(name: str, value: Any) -> None:
    """A finite number of at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"{option(name)} must be a number of at least 0, not {value}.")


def at_least(least: int) -> Check:
    """A whole number of at least so many."""

    def check(name: str, value: Any) -> None:
        _check_whole(option(name), value, least)

    return check


def each_at_least(least: int) -> Check:
    """Several whole numbers, each of at least so many."""

    def check(name: str, value: Any) -> None:
        for one in value:
            _check_whole(f"Each number in {option(name)}", one, least)

    return check


def _check_whole(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{what} must be a whole number of at least {least}, not {value}.")


def one_of(known: Callable[[], Sequence[str]]) -> Check:
    """One of these names, which are asked for when needed."""

    def check(name: str, value: Any) -> None:
        if value not in known():
            raise OptionError(f"There is no {name} {value!r}; choose one of {', '.join(known())}.")

    return check
