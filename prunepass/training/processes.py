"""Several processes that train together (torchrun, accelerate launch): what only one of them does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from prunepass.errors import PruneError

__all__ = ["from_main", "is_main", "leave", "world_size"]

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that prints and writes. True where there is only one.

    It goes by what launchers set, so that asking starts nothing.
    """
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, in all of them; the others wait for it, and learn of its errors.

    Raises:
        PruneError: ``make`` failed in the main process, which raises its own error.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())  # it has to be told, or each process is alone
    if state.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    if not state.is_main_process:
        made, failure = broadcast_object_list([None, None])
        if failure is not None:
            raise PruneError(f"The main process failed: {failure}")
        value: T = made
        return value
    try:
        own = make()
    except Exception as e:  # whatever it is, the others must not wait for ever
        broadcast_object_list([None, f"{type(e).__name__}: {e}"])
        raise
    broadcast_object_list([own, None])
    return own


def leave() -> None:
    """Parts from the other processes, once all have come here: one that just ends can take others down with it."""
    from accelerate import PartialState

    if world_size() > 1:
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
