"""Converted models on disk, so that the next process need not export and convert them again.

An entry is a folder named by its key (`prunepass.backends._graph_key`), which appears whole or not at all: files are
written beside it and moved into place. Each file's size and hash are checked before it is used; an entry that fails is
left aside with a warning and written anew. Nothing in it is unpickled, yet runtimes trust their models: use a folder
that only you can write. Entries are never removed; delete the folder when you like.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["CacheInfo", "DamagedError", "Entries", "cache_info", "current", "using"]

logger = logging.getLogger(__name__)

VARIABLE = "PRUNEPASS_CACHE"
_DESCRIPTION = "entry.json"
_DAY = 24 * 3600.0
T = TypeVar("T")


@dataclass(frozen=True)
class CacheInfo:
    """What the cache on disk did in this process.

    Attributes:
        hits: sessions made of an entry.
        misses: sessions made without one, which wrote one (unless the disk refused).
        damaged: entries that failed their check; each is a miss as well.
        skipped: sessions of graphs that have no key, such as those with functions of one's own.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    skipped: int = 0


class DamagedError(Exception):
    """An entry is not what was written."""


_info = CacheInfo()
_lock = threading.Lock()
_folder: ContextVar[Path | None] = ContextVar("prunepass_cache", default=None)


def cache_info() -> CacheInfo:
    """Hits and misses of the cache on disk since this process began."""
    return _info


def count(what: str) -> None:
    """Add one to a field of `CacheInfo`."""
    global _info
    with _lock:
        _info = replace(_info, **{what: getattr(_info, what) + 1})


@contextlib.contextmanager
def using(folder: str | Path | None) -> Iterator[None]:
    """Graphs that are lowered within use this folder; None leaves it to the variable ``PRUNEPASS_CACHE``."""
    token = _folder.set(None if folder is None else Path(folder).expanduser())
    try:
        yield
    finally:
        _folder.reset(token)


def current() -> Path | None:
    """The folder that graphs lowered now use; None for no cache."""
    folder = _folder.get()
    if folder is None and (named := os.environ.get(VARIABLE)):
        folder = Path(named).expanduser()
    return folder


@dataclass(frozen=True)
class Entries:
    """The entries of one folder. Several processes may use it at once."""

    folder: Path

    def read(self, key: str, load: Callable[[Path, Any], T]) -> T | None:
        """``load(folder of the entry, its notes)``, or None where there is no entry or it is damaged.

        Args:
            load: raises `DamagedError`, or what the runtime raises, where it cannot use the files.
        """
        place = self.folder / key
        if not place.is_dir():
            return None
        try:
            return load(place, _checked(place))
        except Exception as e:  # whatever a runtime says of files it cannot read, there is another way to get them
            logger.warning("%s is damaged and will be written anew: %s: %s", place, type(e).__name__, e)
            count("damaged")
            self._remove(place)
            return None

    def write(self, key: str, save: Callable[[Path], Any]) -> None:
        """Make an entry of the files and the notes (plain data) that ``save(folder)`` leaves and returns.

        A disk that refuses is reported and no error. Of two processes the first one's entry stays.
        """
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            partial = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
            notes = save(partial)
            _describe(partial, notes)
            _share(partial)
            with contextlib.suppress(FileExistsError):
                partial.rename(self.folder / key)
        except OSError as e:
            # another process was faster: a rename onto a folder with files in it
            if not (self.folder / key).is_dir():
                logger.warning("the cache in %s cannot be written: %s", self.folder, e)
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def _remove(self, place: Path) -> None:
        """Out of the way first, so that no other process finds half an entry."""
        with contextlib.suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
            place.rename(aside / place.name)
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes that were killed have left."""
        for left in self.folder.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _DAY:
                    shutil.rmtree(left, ignore_errors=True)


def _share(folder: Path) -> None:
    """Let those read an entry who may read what this user writes, by the umask; temporary folders are private."""
    plain = folder / _DESCRIPTION
    readers = plain.stat().st_mode & 0o444
    folder.chmod(0o700 | readers | readers >> 2)


def _describe(folder: Path, notes: Any) -> None:
    files = {f.name: [f.stat().st_size, _hash(f)] for f in sorted(folder.iterdir())}
    body = json.dumps({"files": files, "notes": notes}, sort_keys=True)
    description = {"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    (folder / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def _checked(folder: Path) -> Any:
    description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    body = description["body"]
    if hashlib.sha256(body.encode()).hexdigest() != description["sha256"]:
        raise DamagedError(f"{_DESCRIPTION} does not have its hash")
    content = json.loads(body)
    for name, (size, digest) in content["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or _hash(file) != digest:
            raise DamagedError(f"{name} is not what was written")
    return content["notes"]


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
