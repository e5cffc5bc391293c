"""Several processes that train together (torchrun, accelerate launch, mpirun): what only one of them does."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

from prunepass.errors import PruneError

__all__ = ["computes_on_cpu", "from_main", "is_main", "leave", "world_size"]

T = TypeVar("T")
_LAUNCHERS = ("", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")  # those that accelerate knows


def is_main() -> bool:
    """Whether this process is the one that prints and writes. True where there is only one.

    It goes by what launchers set, so that asking starts nothing.
    """
    return world_size() == 1 or _launched("RANK", 0) == 0


def world_size() -> int:
    """How many processes a launcher has started."""
    return _launched("SIZE", 1)


def computes_on_cpu() -> bool:
    """Whether training is to run on the CPU: for want of anything better, as ACCELERATE_USE_CPU says so, or because
    several processes cannot work together on what there is (Apple's GPU)."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return True
    device = torch.accelerator.current_accelerator()
    return world_size() > 1 and device is not None and device.type == "mps"


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, in all of them; the others wait for it, and learn of its errors.

    Raises:
        PruneError: ``make`` failed in the main process, which raises its own error.
    """
    if world_size() == 1:
        return make()
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=computes_on_cpu())  # it has to be told, or each process is alone
    # a group of their own, as a search may take longer than the others would wait in the group that trains
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if not state.is_main_process:
        told: list[T | str | None] = [None, None]
        dist.broadcast_object_list(told, src=0, group=group)
        if told[1] is not None:
            raise PruneError(f"The main process failed: {told[1]}")
        return told[0]  # type: ignore[return-value]  # what is told beside no error is a T
    try:
        own = make()
    except Exception as e:  # whatever it is, the others must not wait for ever
        dist.broadcast_object_list([None, f"{type(e).__name__}: {e}"], src=0, group=group)
        raise
    dist.broadcast_object_list([own, None], src=0, group=group)
    return own


def leave() -> None:
    """Parts from the other processes, once all have come here: one that just ends can take others down with it."""
    if world_size() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=computes_on_cpu())
        state.wait_for_everyone()
        state.destroy_process_group()


def _launched(what: str, default: int) -> int:
    for launcher in _LAUNCHERS:
        name = f"{launcher}{what}" if launcher else {"SIZE": "WORLD_SIZE"}.get(what, what)
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default
