"""The rows of the files that texts come from: where any stretch of them lies, and what is in it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunepass.bulk.lines import record, records
from prunepass.bulk.sources import Columns, Piece, Source, Stretch, pyarrow
from prunepass.errors import DataError

__all__ = ["Row", "check_same", "read", "stretches"]

_INT64 = 2**63


@dataclass(frozen=True)
class Row:
    """One document.

    Attributes:
        file: name of its file.
        number: of the row in it, from 0.
        id: None where there is none.
        text: whatever stands there; for a model of pairs, two.
        wrong: why it cannot be read.
    """

    file: str
    number: int
    id: Any
    text: Any
    wrong: str | None = None


# -- how many rows, and where ----------------------------------------------------------------------------------------


def stretches(sources: Sequence[Source], rows: int) -> Iterator[Stretch]:
    """All rows, in order, ``rows`` at a time. Files that are no Parquet are read through once for it.

    Raises:
        DataError: a file cannot be read; of a CSV file with quotes that are never closed, the line.
    """
    pieces: list[Piece] = []
    documents = room = 0
    for number, source in enumerate(sources):
        open_piece: list[int] | None = None
        for row, (at, many, counts) in enumerate(_places(source)):
            taken = 0
            while taken < many:
                if room == 0:
                    if open_piece is not None:
                        pieces.append(Piece(number, *open_piece))
                    if pieces:
                        yield Stretch(tuple(pieces), documents)
                    pieces, documents, room, open_piece = [], 0, rows, None
                step = min(room, many - taken)
                if open_piece is None:
                    open_piece = [at + taken, row + taken, 0]
                open_piece[2] += step
                documents += step if counts else 0
                room -= step
                taken += step
        if open_piece is not None:
            pieces.append(Piece(number, *open_piece))
    if pieces:
        yield Stretch(tuple(pieces), documents)


def _places(source: Source) -> Iterator[tuple[int, int, bool]]:
    """Where each row begins, how many begin there (all of a Parquet file), and whether it is a document."""
    try:
        if source.kind == "parquet":
            yield 0, pyarrow().parquet.read_metadata(source.path).num_rows, True
        elif source.kind == "csv":
            at = 0
            for i, (_, end) in enumerate(records(source.path, 0)):
                if i:
                    yield at, 1, True
                at = end
        else:
            at = 0
            with Path(source.path).open("rb") as file:
                for line in file:
                    yield at, 1, not _is_blank(line)
                    at += len(line)
    except csv.Error as e:
        raise DataError(f"{source.name} is no CSV that can be read: {e}. Mend it and start again.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{source.name} cannot be read: {' '.join(str(e).split())[:200]}") from None


def _is_blank(line: bytes) -> bool:
    return not line.strip()


# -- rows ------------------------------------------------------------------------------------------------------------


def read(sources: Sequence[Source], columns: Columns, stretch: Stretch) -> Iterator[Row]:
    """The documents of a stretch.

    Raises:
        DataError: a file is gone, or another one stands in its place.
    """
    for piece in stretch.pieces:
        source = sources[piece.source]
        check_same(source)
        rows = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl, "text": _text}[source.kind]
        for row in rows(source, columns, piece):
            yield (
                row
                if columns.id is not None
                else Row(row.file, row.number, f"{row.file}:{row.number}", row.text, row.wrong)
            )


def check_same(source: Source) -> None:
    """Raises `DataError` where a file is not as it was when the run began."""
    try:
        about = Path(source.path).stat()
    except OSError:
        raise DataError(f"{source.path}, which is read, is gone.") from None
    if (about.st_size, about.st_mtime_ns) != (source.size, source.changed):
        raise DataError(f"{source.path} has changed since the run began. Start anew in another folder.")


def _parquet(source: Source, columns: Columns, piece: Piece) -> Iterator[Row]:
    pa = pyarrow()
    with pa.parquet.ParquetFile(source.path) as file:
        start, groups, first = 0, [], None
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if start < piece.at + piece.rows and start + size > piece.at:
                groups.append(group)
                first = start if first is None else first
            start += size
        number = first or 0
        end = piece.at + piece.rows
        for batch in file.iter_batches(batch_size=4096, row_groups=groups, columns=columns.names):
            low, high = max(piece.at - number, 0), min(end - number, len(batch))
            if low < high:
                values = {name: _values(batch.column(name)[low:high]) for name in columns.names}
                for i in range(high - low):
                    yield _row(source, columns, number + low + i, {name: values[name][i] for name in values})
            number += len(batch)
            if number >= end:
                return


def _values(column: Any) -> list[Any]:
    """Of an Arrow array; text that is no UTF-8 with its bytes escaped."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [
            bytes(value.as_buffer()).decode("utf-8", "surrogateescape") if value.is_valid else None for value in column
        ]


def _csv(source: Source, columns: Columns, piece: Piece) -> Iterator[Row]:
    for i, (fields, _) in enumerate(records(source.path, piece.at)):
        if i == piece.rows:
            return
        if len(fields) != len(source.header):
            said = f"has {len(fields)} fields, and the header {len(source.header)}"
            yield Row(source.name, piece.row + i, None, ",".join(fields), said)
            continue
        values: dict[str, Any] = dict(zip(source.header, fields, strict=True))
        yield _row(source, columns, piece.row + i, {name: values[name] or None for name in columns.names})


def _lines(source: Source, piece: Piece) -> Iterator[tuple[int, bytes]]:
    with Path(source.path).open("rb") as file:
        file.seek(piece.at)
        for i in range(piece.rows):
            line = file.readline()
            if not _is_blank(line):
                yield piece.row + i, line


def _text(source: Source, columns: Columns, piece: Piece) -> Iterator[Row]:
    for number, line in _lines(source, piece):
        text = line.decode("utf-8", "surrogateescape").strip().removeprefix("\ufeff")
        yield Row(source.name, number, None, text)


def _jsonl(source: Source, columns: Columns, piece: Piece) -> Iterator[Row]:
    for number, line in _lines(source, piece):
        found = record(line)
        if isinstance(found, dict):
            yield _row(source, columns, number, found)
        else:
            raw = line.decode("utf-8", "surrogateescape").strip()
            yield Row(source.name, number, None, raw, "is no JSON object")


def _row(source: Source, columns: Columns, number: int, values: Mapping[str, Any]) -> Row:
    text = values.get(columns.text)
    if columns.pair is not None:
        text = (text, values.get(columns.pair))
    key = None if columns.id is None else values.get(columns.id)
    return Row(source.name, number, key, text, None if columns.id is None else _fault_of_id(key, source.ids))


def _fault_of_id(key: Any, kind: str) -> str | None:
    if key is None:
        return "has no id"
    if kind == "string":
        if not isinstance(key, str):
            return f"has an id of type {type(key).__name__}, and the first one is text"
        return None if _encodes(key) else "has an id that is no valid Unicode"
    if isinstance(key, bool) or not isinstance(key, int):
        return f"has an id of type {type(key).__name__}, and the first one is a whole number"
    low, high = (0, 2 * _INT64) if kind == "uint64" else (-_INT64, _INT64)
    return None if low <= key < high else "has an id that needs more than 64 bits"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
