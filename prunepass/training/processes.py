"""Several processes that train together (torchrun, accelerate launch): what only one of them does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from prunepass.errors import PruneError

__all__ = ["from_main", "is_main"]

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that prints and writes: by the RANK that launchers set, so that asking starts
    nothing. True where there is only one."""
    return os.environ.get("RANK", "0") == "0"


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, in all of them; the others wait for it, and get its errors, too.

    Raises:
        PruneError: ``make`` did.
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return make()
    made: list[Any] = [None]
    if state.is_main_process:
        try:
            made = [make()]
        except PruneError as e:
            made = [e]
    from accelerate.utils import broadcast_object_list

    made = broadcast_object_list(made)
    if isinstance(made[0], PruneError):
        raise made[0]
    value: T = made[0]
    return value
