"""What all commands share: where they print to, how errors and progress look."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from prunepass.errors import PruneError

__all__ = ["clear_errors", "err", "out", "print_json", "working"]

#: of a message that is not ours
_LONGEST = 400

out = Console()
err = Console(stderr=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Any error as one line and exit code 2, Ctrl-C as one line and 130; PRUNEPASS_DEBUG=1 shows the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped", highlight=False)
        raise typer.Exit(130) from None
    except Exception as error:  # Dynamo wraps ours in its own kinds
        if os.environ.get("PRUNEPASS_DEBUG", "0") not in ("", "0") or isinstance(error, (typer.Exit, typer.Abort)):
            raise
        err.print(f"[bold red]error:[/] {escape(_in_one_line(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _in_one_line(error: Exception) -> str:
    """Ours in full; of others' the kind and the first line, as they may go on for pages."""
    ours = _ours(error)
    if ours is not None:
        return " ".join(str(ours).split())
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}{': ' if lines else ''}{lines[0][:_LONGEST] if lines else ''}"
    if isinstance(error, OSError):
        return what
    return f"{what} (not expected; the environment variable PRUNEPASS_DEBUG=1 shows where)"


def _ours(error: BaseException | None) -> PruneError | None:
    """The `PruneError` that was raised, also where torch.compile has wrapped it in an error of its own."""
    while error is not None:
        if isinstance(error, PruneError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


@contextmanager
def working(what: str, *, hidden: bool = False) -> Iterator[None]:
    """A spinner on stderr."""
    with nullcontext() if hidden else err.status(what):
        yield


def print_json(data: dict[str, Any]) -> None:
    """Figures for scripts, on stdout."""
    typer.echo(json.dumps(data, indent=2, default=str))
