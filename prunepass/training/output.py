"""The folder that training or search writes: refused early where it is taken, and never left half written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunepass.errors import OptionError

__all__ = ["check_free", "checkpoints_of", "last_checkpoint", "new_folder"]


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raise `OptionError` where ``folder`` cannot be written: a file, or not empty and ``overwrite`` is not said."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; give the name of a folder to write.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OptionError(f"{folder} exists and is not empty. Choose another folder, or ask for it to be overwritten.")


def checkpoints_of(folder: Path) -> Path:
    """Where checkpoints go while ``folder`` is in the making: ``folder.checkpoints`` beside it."""
    return folder.with_name(f"{folder.name}.checkpoints")


def last_checkpoint(folder: Path) -> Path:
    """The newest of the checkpoints ``checkpoint-<step>`` that belong to ``folder``.

    Raises:
        OptionError: there is none to go on from.
    """
    home = checkpoints_of(folder)
    steps = {int(p.name.removeprefix("checkpoint-")): p for p in home.glob("checkpoint-*") if _numbered(p)}
    if not steps:
        raise OptionError(f"There is no checkpoint in {home} to resume from; leave out resume to start anew.")
    return steps[max(steps)]


def _numbered(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place if all goes well, and vanishes if not.

    What stood there before (only with ``overwrite``) is removed once the new one stands in its place.
    """
    check_free(folder, overwrite=overwrite)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fresh, old = work / "new", work / "old"
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
