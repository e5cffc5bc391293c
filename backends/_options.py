"""Messages and checks for options that come from a user as plain names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from prunepass.errors import OptionError, option

__all__ = ["check_mapping", "pairs", "unknown"]


def unknown(name: Any, kind: str, known: Iterable[str]) -> str:
    """The message for an unknown name: what it is, the nearest known one, and all of them where they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Known: {', '.join(names)}." if len(names) <= 20 else ""
    return f"Unknown {kind} {name!r}.{guess}{listed}"


def check_mapping(config: Any, target: str) -> dict[str, Any]:
    """A copy of ``config``, so that no runtime changes the user's own.

    Raises:
        OptionError: it is not a mapping with text keys.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping) or not all(isinstance(k, str) for k in config):
        raise OptionError(f"The config of target {target!r} must be a mapping from names to values, not {config!r}.")
    return dict(config)


def pairs(given: Iterable[str] | None) -> dict[str, str]:
    """A target's settings as they stand on a command line: ``["KEY=VALUE", ...]``.

    Raises:
        OptionError: one has no key, or no ``=``.
    """
    settings = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"{option('config')} takes KEY=VALUE, not {pair!r}.")
        settings[key] = value
    return settings
