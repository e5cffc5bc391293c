"""How a long command stops, and what it says of going on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.markup import escape

from prunepass.cli.common import err
from prunepass.errors import OptionError
from prunepass.training.loop.output import last_checkpoint, step_of
from prunepass.training.loop.processes import is_main

__all__ = ["again", "how_to_go_on", "interruptible", "say_stopping"]


def say_stopping() -> None:
    """That the first Ctrl-C was heard."""
    err.print("Stopping after this step. Press Ctrl-C again to stop at once.", highlight=False)


@contextmanager
def interruptible(advice: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends with one line on stderr and exit code 130, as shells have it.

    Args:
        advice: what to do next.
    """
    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            err.print(f"Stopped. {escape(advice())}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def how_to_go_on(folder: Path) -> str:
    """The command that goes on with a training that writes to ``folder``, or starts it anew."""
    try:
        step = step_of(last_checkpoint(folder))
    except OptionError:
        return f"There is no checkpoint yet. Start anew with {again()}"
    return f"Step {step} was saved. Go on with {again('--resume')}"


def again(*more: str) -> str:
    """The command that runs, with more options."""
    if Path(sys.argv[0]).stem not in ("prunepass", "__main__"):
        return " ".join(["the same command", *(f"and {option}" for option in more)])
    return shlex.join(["prunepass", *(a for a in sys.argv[1:] if a not in more), *more])
