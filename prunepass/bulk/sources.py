"""The files that texts come from: which they are, and their columns, checked before any work."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunepass.bulk.lines import record, records
from prunepass.errors import DataError, MissingExtraError, option

__all__ = ["KINDS", "Columns", "Piece", "Source", "Stretch", "as_sources", "files_of", "find_sources", "pyarrow"]

KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
#: where ids are not asked for by name, this column is taken if every file has it
ID = "id"
#: records of a JSON lines file that are looked at for its columns
_LOOKED_AT = 100


@dataclass(frozen=True)
class Columns:
    """Where a row's parts are; of text files the line is the text.

    Attributes:
        text: column of the texts.
        pair: column of the second texts, for a model of pairs.
        id: column of the ids; None makes them of file and row.
    """

    text: str
    pair: str | None
    id: str | None

    @property
    def names(self) -> list[str]:
        """Those that there must be."""
        return list(dict.fromkeys(name for name in (self.text, self.pair, self.id) if name is not None))


@dataclass(frozen=True)
class Source:
    """A file.

    Attributes:
        name: as it was given, which made ids begin with.
        path: of the file, from the root.
        kind: one of `KINDS`.
        size, changed: bytes and time of the last change in nanoseconds: whether it is still the same.
        header: columns of a CSV file.
        ids: type of the ids, as Arrow calls it.
    """

    name: str
    path: str
    kind: str
    size: int
    changed: int
    header: tuple[str, ...] = ()
    ids: str = "string"


@dataclass(frozen=True)
class Piece:
    """A stretch of one file.

    Attributes:
        source: number of the file.
        at: where it begins: a row in Parquet, a byte in others.
        row: number of its first row in the file; lines without anything count.
        rows: how many there are.
    """

    source: int
    at: int
    row: int
    rows: int


@dataclass(frozen=True)
class Stretch:
    """Rows of one file or several that follow each other.

    Attributes:
        documents: lines without anything are none.
    """

    pieces: tuple[Piece, ...]
    documents: int


def pyarrow() -> Any:
    """The package, or `MissingExtraError`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "bulk", "Reading and writing Parquet") from None
    return pyarrow


# -- which files -----------------------------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str | Path], columns: Columns) -> tuple[list[Source], Columns]:
    """The files, those in folders sorted by name, with the columns of all of them looked at.

    Returns:
        The files, and the columns with the one of ids filled in.

    Raises:
        DataError: there is no such file, it is of no known kind, lacks a column, or has one of another type.
    """
    found = [source for given in inputs for source in files_of(Path(given).expanduser())]
    paths = [source.path for source in found]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"{path} is given twice.")
    looks = [_look(source) for source in found]
    if columns.id is None and all(ID in look for look in looks):
        columns = Columns(columns.text, columns.pair, ID)
    checked = [_checked(source, look, columns) for source, look in zip(found, looks, strict=True)]
    for source in checked:
        if source.ids != checked[0].ids:
            raise DataError(
                f"Ids in {checked[0].name} are of type {checked[0].ids}, and in {source.name} of type {source.ids}. "
                f"Run them one after the other, or choose another column with {option('id')}."
            )
    return checked, columns


def files_of(path: Path) -> Iterator[Source]:
    """A file, or those in a folder and the folders in it, sorted by name.

    Raises:
        DataError: there is no such file, or it is of no known kind.
    """
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in KINDS)
        hidden = [p for p in inside if any(part[0] in "._" for part in p.relative_to(path).parts)]
        files = [p for p in inside if p not in hidden]
        if not files:
            raise DataError(f"The folder {path} has no file that ends in {', '.join(KINDS)}.")
        for file in files:
            yield from files_of(file)
        return
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path} is of no known kind. Files end in {', '.join(KINDS)}; decompress or convert it first.")
    about = path.stat()
    yield Source(str(path), str(path.resolve()), kind, about.st_size, about.st_mtime_ns)


def _look(source: Source) -> Mapping[str, Any]:
    """The columns by name: Arrow's types of a Parquet file, first values of others; of a text file none."""
    try:
        if source.kind == "parquet":
            schema = pyarrow().parquet.read_schema(source.path)
            return dict(zip(schema.names, schema.types, strict=True))
        if source.kind == "csv":
            header = next((one for one, _ in records(source.path, 0)), [])
            return dict.fromkeys(header, str)
        if source.kind == "jsonl":
            return _first_values(source)
    except MissingExtraError:
        raise
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"{source.name} cannot be read: {' '.join(str(e).split())[:200]}") from None
    return {}


def _first_values(source: Source) -> dict[str, Any]:
    values: dict[str, Any] = {}
    with Path(source.path).open("rb") as file:
        for line, _ in zip(file, range(_LOOKED_AT), strict=False):
            found = record(line)
            if isinstance(found, dict):
                values = {**found, **values}
    return values


def _checked(source: Source, look: Mapping[str, Any], columns: Columns) -> Source:
    """The file with its header and its type of ids. Raises `DataError` for columns that it lacks."""
    if source.kind == "text":
        if columns.pair is not None:
            raise DataError(f"{source.name} has one text a line; pairs of texts come from columns.")
        if columns.id is not None:
            raise DataError(f"{source.name} has texts and no column {columns.id!r}; leave out {option('id')}.")
        return source
    for name in columns.names:
        if name not in look:
            there = ", ".join(map(repr, look)) or "none"
            flag = {columns.text: "column", columns.pair: "pair"}.get(name, "id")
            raise DataError(f"{source.name} has no column {name!r}; there are {there}. Choose one with {option(flag)}.")
    header = tuple(look) if source.kind == "csv" else ()
    if source.kind == "parquet":
        for name in filter(None, (columns.text, columns.pair)):
            if not _is_text(look[name]):
                raise DataError(f"The column {name!r} of {source.name} is of type {look[name]}, and no text.")
    return Source(**{**asdict(source), "header": header, "ids": _type_of_ids(source, look, columns)})


def _type_of_ids(source: Source, look: Mapping[str, Any], columns: Columns) -> str:
    if columns.id is None or source.kind == "csv":
        return "string"
    first = look[columns.id]
    if source.kind == "jsonl":
        return "int64" if isinstance(first, int) and not isinstance(first, bool) else "string"
    types = pyarrow().types
    if types.is_integer(first):
        return "uint64" if types.is_uint64(first) else "int64"
    if not _is_text(first):
        raise DataError(
            f"The column {columns.id!r} of {source.name} is of type {first}; ids are whole numbers or text."
        )
    return "string"


def _is_text(kind: Any) -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def as_sources(data: Iterable[Mapping[str, Any]]) -> list[Source]:
    """Of what `dataclasses.asdict` gave, by way of JSON."""
    return [Source(**{**one, "header": tuple(one["header"])}) for one in data]
