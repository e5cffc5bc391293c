"""The folder that a run writes: what it was started with, its shards, and what went wrong. Nothing half-written counts.

::

    part-00000.parquet        a shard: ids and results; it appears in one step, when all of it is on the disk
    _run.json                 what the run was started with, and which rows make up each shard
    _dead_letters/            by shard, documents that went wrong; one file, _dead_letters.jsonl, when the run is done
    _unfinished/              shards in the making, and those whose process was ended
    _done.json                counts; it is written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunepass.bulk.sources import Columns, Piece, Source, Stretch, as_sources, pyarrow
from prunepass.errors import ExportError, OptionError, PruneError, option

__all__ = ["Counts", "Output", "Run", "Summary", "fingerprint"]

FORMAT, VERSION = "prunepass-embed", 1
RUN, DONE, LOCK = "_run.json", "_done.json", "_lock"
LETTERS, UNFINISHED = "_dead_letters", "_unfinished"
_KEY = b"prunepass"


@dataclass(frozen=True)
class Run:
    """What a run is: all that its results depend on.

    Attributes:
        model: the exported folder.
        digest: of its files.
        settings: keyword arguments of `Embedder`.
        columns, sources, shards: what is read.
    """

    model: str
    digest: str
    settings: Mapping[str, Any]
    columns: Columns
    sources: Sequence[Source]
    shards: Sequence[Stretch]

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True)
class Counts:
    """Of a shard: documents with a result, those that went wrong, and tokens that the model read."""

    rows: int
    wrong: int
    tokens: int


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        documents: that were read: those with a result (``rows``) and those that went wrong (``wrong``).
        tokens: that the model read for them.
        repeated: documents of shards that were begun once more, as a process was ended; each is in the output once.
        seconds: of this run; those before it that were broken off do not count.
        duplicates: rows whose id another row before them has, of those with a result. All of them are in the output.
    """

    documents: int
    rows: int
    wrong: int
    tokens: int
    repeated: int
    seconds: float
    duplicates: int = 0


class Output:
    """The folder, from this process or another. Making one touches nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # -- the run -----------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Make the folder. Raises `ExportError` where it cannot be written."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            data = {"format": FORMAT, "version": VERSION, **asdict(run)}
            data["shards"] = [
                [shard.documents, [[p.source, p.at, p.row, p.rows] for p in shard.pieces]] for shard in run.shards
            ]
            _replace(self.folder / RUN, json.dumps(data).encode())

    def read(self) -> Run | None:
        """What the folder was begun with; None where it was not.

        Raises:
            OptionError: it holds something else, or was begun by another version.
        """
        file = self.folder / RUN
        if not file.is_file():
            if self.folder.is_dir() and any(p.name not in (LOCK, LETTERS, UNFINISHED) for p in self.folder.iterdir()):
                raise OptionError(f"{self.folder} holds other files and no run to go on with; choose another folder.")
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise OptionError(
                    f"{self.folder} was begun by another version of prunepass (format {data['version']}; this one "
                    f"writes {VERSION}). Finish it there, or choose another folder."
                )
            shards = [Stretch(tuple(Piece(*p) for p in pieces), documents) for documents, pieces in data["shards"]]
            columns, sources = Columns(**data["columns"]), as_sources(data["sources"])
            return Run(data["model"], data["digest"], data["settings"], columns, sources, shards)
        except (OSError, ValueError, KeyError, TypeError) as e:
            if isinstance(e, OptionError):
                raise
            raise OptionError(f"{file} cannot be read; choose another folder, or remove this one.") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second run out of the folder.

        Raises:
            OptionError: there is one.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError(f"{self.folder} is being written by another run; wait until it ends.") from None
            except OSError:  # a file system without locks
                pass
            yield

    # -- shards ------------------------------------------------------------------------------------------------------

    def part(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{number:05d}.parquet"

    def counts(self, number: int) -> Counts | None:
        """Of a shard that is whole; None where it is not there, cut off, or of another run."""
        try:
            found = pyarrow().parquet.read_metadata(self.part(number))
            said = json.loads(found.metadata[_KEY])
            counts = Counts(said["rows"], said["wrong"], said["tokens"])
        except (OSError, ValueError, KeyError, TypeError):  # pyarrow's own errors are of the first two kinds
            return None
        run, documents = said.get("run"), said.get("documents")
        whole = found.num_rows == counts.rows and counts.rows + counts.wrong == documents
        return counts if whole and (run, said.get("shard")) == (self.name(), number) else None

    def name(self) -> str:
        """Of the run, which its shards carry."""
        return hashlib.sha256((self.folder / RUN).read_bytes()).hexdigest()[:16]

    def mark(self, number: int) -> Path:
        """A file for a shard in the making; one that stays tells of a process that was ended."""
        with _writing(self.folder):
            (self.folder / UNFINISHED).mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f"part-{number:05d}.", dir=self.folder / UNFINISHED)
            os.close(handle)
        return Path(name)

    def write(self, number: int, table: Any, letters: Sequence[Mapping[str, Any]], tokens: int, mark: Path) -> Counts:
        """A shard and its dead letters: both are there, or the shard is not.

        Raises:
            ExportError: the disk is full, or refuses.
        """
        counts = Counts(len(table), len(letters), tokens)
        said = {"run": self.name(), "shard": number, "documents": counts.rows + counts.wrong, **asdict(counts)}
        pa = pyarrow()
        with _writing(self.folder):
            file = self.folder / LETTERS / f"part-{number:05d}.jsonl"
            if letters:
                file.parent.mkdir(exist_ok=True)
                _replace(file, "".join(json.dumps(letter) + "\n" for letter in letters).encode())
            else:
                file.unlink(missing_ok=True)
            table = table.replace_schema_metadata({_KEY: json.dumps(said)})
            pa.parquet.write_table(table, mark, use_dictionary=False)
            mark.chmod(0o666 & ~_umask())
            _sync(mark)
            mark.replace(self.part(number))
            _sync(self.folder)
        return counts

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, run: Run, seconds: float) -> Summary:
        """Check every shard, gather the dead letters, and say that all is done.

        Raises:
            PruneError: a shard is not there.
            ExportError: the disk is full, or refuses.
        """
        found = [self.counts(number) for number in range(len(run.shards))]
        for number, counts in enumerate(found):
            if counts is None:
                raise PruneError(f"{self.part(number)} is not there or not whole. Go on with {option('resume', True)}.")
        whole = [counts for counts in found if counts is not None]
        summary = Summary(
            run.documents,
            sum(counts.rows for counts in whole),
            sum(counts.wrong for counts in whole),
            sum(counts.tokens for counts in whole),
            sum(run.shards[number].documents for number in self._marked()),
            round(seconds, 3),
            0 if run.columns.id is None else self._duplicates(len(run.shards)),  # file:row is never twice
        )
        with _writing(self.folder):
            self._gather_letters(range(len(run.shards)))
            _replace(self.folder / DONE, json.dumps(asdict(summary), indent=2).encode())
            shutil.rmtree(self.folder / LETTERS, ignore_errors=True)
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        return summary

    def done(self) -> Summary | None:
        """Of a run that is done."""
        try:
            return Summary(**json.loads((self.folder / DONE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _duplicates(self, shards: int) -> int:
        """Rows whose id was there before. Ids are held by a hash of 8 bytes, as there may be hundreds of millions."""
        import numpy as np

        found = [np.zeros(0, np.int64)]
        for number in range(shards):
            ids = pyarrow().parquet.read_table(self.part(number), columns=["id"])["id"].to_pylist()
            # of the text: Python gives some different numbers one hash, -1 and -2 among them
            found.append(np.fromiter((hash(str(id)) for id in ids), np.int64, len(ids)))
        hashes = np.concatenate(found)
        del found
        hashes.sort()
        return int((hashes[1:] == hashes[:-1]).sum())

    def _marked(self) -> list[int]:
        """Shards that were begun in vain, once for each time."""
        names = (path.name.split(".")[0].removeprefix("part-") for path in (self.folder / UNFINISHED).glob("part-*"))
        return [int(name) for name in names if name.isdigit()]

    def _gather_letters(self, numbers: Sequence[int]) -> None:
        files = [self.folder / LETTERS / f"part-{number:05d}.jsonl" for number in numbers]
        files = [file for file in files if file.is_file()]
        if not files:
            return
        target = self.folder / f"{LETTERS}.jsonl"
        fresh = target.with_name(f"{target.name}.new")
        with fresh.open("wb") as out:
            for file in files:
                with file.open("rb") as part:
                    shutil.copyfileobj(part, out)
        _sync(fresh)
        fresh.replace(target)


def fingerprint(folder: Path) -> str:
    """Of all files in an exported folder that results depend on."""
    digest = hashlib.sha256()
    wanted = ("openvino_model.*", "model.onnx*", "*.json")
    for file in sorted({file for pattern in wanted for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        said = e.strerror or " ".join(str(e).split())
        raise ExportError(
            f"{folder} could not be written: {said}. What is whole stays; make room and go on with "
            f"{option('resume', True)}."
        ) from e


def _replace(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        Path(name).chmod(0o666 & ~_umask())
        _sync(Path(name))
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Have the disk take a file or the names in a folder for good."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError as e:
        if path.is_file() or e.errno not in (22, 95):  # not every file system syncs folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
