"""Folders to write: whether they can be, checked before any work; and new ones that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prunepass.errors import ExportError, OptionError

__all__ = ["as_path", "check_file", "check_writable", "filled", "sync", "sync_folder", "usual_modes", "writing"]

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


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """What the disk says meanwhile becomes one line that names ``what``.

    Raises:
        ExportError: the disk is full, or refuses.
    """
    try:
        yield
    except OSError as e:
        raise ExportError(f"{what} could not be written: {_reason(e)}.") from e


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` if all goes well, and vanishes if not.

    ``folder`` must not exist, or be empty. Until the last moment the files lie in a hidden folder beside it; within it,
    where it is a disk of its own or the folder around it cannot be written.

    Raises:
        OptionError, ExportError: it cannot be written.
    """
    target = Path(os.path.realpath(as_path(folder)))
    above = [place for place in target.parents if not place.exists()]
    work = None
    try:
        with writing(folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            work, inside = _work_folder(target)
            (work / "new").mkdir()
        yield work / "new"
        with writing(folder):
            _finish(work / "new", target, inside)
    except BaseException as e:
        _clear(work, above)
        if isinstance(e, ExportError) and work is not None:  # by the name that the user knows
            raise ExportError(str(e).replace(str(work / "new"), str(folder))) from e
        raise
    _clear(work, [])


def _finish(fresh: Path, target: Path, inside: bool) -> None:
    usual_modes(fresh)
    sync(fresh)
    if inside:
        _move_up(fresh, target)
        return
    fresh.rename(target)
    sync_folder(target.parent)


def _clear(work: Path | None, made: list[Path]) -> None:
    """Remove the hidden folder, and those above that were made for it."""
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    for place in made:
        with suppress(OSError):
            place.rmdir()


def _work_folder(target: Path) -> tuple[Path, bool]:
    """A private folder on the disk of ``target``, and whether it lies in it."""
    if not os.path.ismount(target):
        try:
            return Path(tempfile.mkdtemp(prefix=".prunepass-", dir=target.parent)), False
        except OSError:
            if not target.is_dir():
                raise
    return Path(tempfile.mkdtemp(prefix=".prunepass-", dir=target)), True


def _move_up(fresh: Path, target: Path) -> None:
    moved: list[Path] = []
    try:
        for part in sorted(fresh.iterdir()):
            moved.append(part.rename(target / part.name))
        sync_folder(target)
    except OSError:
        for part in moved:
            part.rename(fresh / part.name)
        raise


def usual_modes(folder: Path) -> None:
    """Let others read the files in a new folder as far as the umask lets them; some libraries write private ones."""
    usual = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | usual)


def sync(folder: Path) -> None:
    """Have the disk take all files in ``folder`` for good; one that is full may say so only now."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            _fsync(path)


def sync_folder(folder: Path) -> None:
    """Have the disk take the names in ``folder`` for good, where the system can."""
    with suppress(OSError):
        _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(file: Path) -> None:
    """As `check_writable`, for one file to be made or replaced.

    Raises:
        OptionError: a folder stands in its place, or a file in that of a folder above it.
        ExportError: it cannot be written.
    """
    file = as_path(file)
    if file.is_dir():
        raise OptionError(f"{file} is a folder; give the name of a file to write.")
    check_writable(file.parent)
    if file.exists():
        try:
            file.open("ab").close()
        except OSError as e:
            raise ExportError(f"{file} cannot be written: {_reason(e)}. Choose another file.") from None


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
