"""Folders to write: whether they can be, checked before any work, by trying it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from prunepass.errors import ExportError, OptionError

__all__ = ["as_path", "check_writable"]

#: written on trial: a full disk often still takes an empty file
_TRIAL_BYTES = 4096


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user's text means, with ``~`` as the home folder.

    Raises:
        OptionError: it is no text, or no name that a file can have.
    """
    try:
        path = Path(name)
        if "\0" in str(path):
            raise ValueError("it holds a null byte")
        return path.expanduser()
    except (TypeError, ValueError, RuntimeError) as e:  # RuntimeError: no home folder
        raise OptionError(f"{name!r} is not the name of a folder or file: {e}.") from None


def check_writable(folder: Path, *, needed_bytes: int = 0) -> None:
    """Raise where ``folder`` cannot be made or written into, so that no work is lost to it later.

    A file is written on trial, into the folder or into the nearest one above it that exists, and removed. Read-only
    mounts, immutable folders, missing permissions and full disks all show in that. The folder itself is not made.

    Args:
        folder: it may exist or not.
        needed_bytes: space that the disk must have left.

    Raises:
        OptionError: a file, or a link that leads nowhere, stands where a folder is to be.
        ExportError: the folder cannot be written, or too little space is left.
    """
    folder = as_path(folder)
    place = _nearest(folder)
    try:
        _try_to_write(place)
        left = _space_left(place)
    except OSError as e:
        into = "" if place == folder else f", because {place} cannot be"
        raise ExportError(f"{folder} cannot be written{into}: {_reason(e)}. Choose another folder.") from None
    if left < needed_bytes:
        raise ExportError(
            f"{folder} needs {_size(needed_bytes)} of space, but the disk of {place} has {_size(left)} left. Make "
            "room, or choose another folder."
        )


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    for place in (folder, *folder.absolute().parents):
        try:
            kind = place.stat().st_mode
        except NotADirectoryError:
            continue  # a file stands further up
        except FileNotFoundError:
            if place.is_symlink():
                raise OptionError(f"{place} is a link to {os.readlink(place)}, which does not exist.") from None
            continue
        except OSError as e:
            raise ExportError(f"{folder} cannot be written: {_reason(e)}. Choose another folder.") from None
        if not stat.S_ISDIR(kind):
            within = "" if place == folder else f", so {folder} cannot be made in it"
            raise OptionError(f"{place} is a file, not a folder{within}. Give the name of a folder to write.")
        return place
    raise ExportError(f"{folder} cannot be written: no folder above it exists.")


def _try_to_write(place: Path) -> None:
    trial = tempfile.TemporaryDirectory(prefix=".prunepass-", dir=place, ignore_cleanup_errors=True)
    with trial as made, open(Path(made) / "trial", "wb") as file:
        file.write(bytes(_TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _space_left(place: Path) -> int:
    return shutil.disk_usage(place).free


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
