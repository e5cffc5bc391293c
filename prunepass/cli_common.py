"""What all commands share: where they print to, how errors and progress look."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prunepass.errors import PruneError

__all__ = ["bar", "clear_errors", "err", "out", "print_json", "working"]

out = Console()
err = Console(stderr=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Our own errors as one line and exit code 2; anything else is a bug, and keeps its traceback."""
    try:
        yield
    except Exception as error:  # Dynamo wraps ours in its own kinds; what is not ours is raised again
        ours = _ours(error)
        if ours is None:
            raise
        err.print(f"[bold red]error:[/] {escape(str(ours))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


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


def bar(*, hidden: bool = False) -> Progress:
    """A progress bar on stderr that vanishes when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=hidden)


def print_json(data: dict[str, Any]) -> None:
    """Figures for scripts, on stdout."""
    typer.echo(json.dumps(data, indent=2, default=str))
