"""Rows of named columns from CSV, TSV and JSON-lines files, and from data sets of the ``datasets`` package."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from prunepass.errors import DataError, MissingExtraError, option
from prunepass.training.data.options import Source

__all__ = ["Row", "Table", "read_table"]

logger = logging.getLogger(__name__)

_LARGEST_FIELD = 2**31 - 1  # csv's own limit of 131,072 characters is less than a long document
#: what may stand between fields, and how many rows tell which it is
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SNIFFED = 20
_Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE
_FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Row:
    """One row: where it stands (``"line 7 of train.csv"``) and its values by column."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """All rows of a source.

    Attributes:
        name: of the file or data set, for messages.
        columns: in the order of the source.
        class_names: of columns whose whole numbers stand for named classes, by number.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_table(source: Source) -> Table:
    """Read all of ``source``.

    Raises:
        DataError: there is no such file or data set, it is empty, or it cannot be read; the message says where and why.
        MissingExtraError: a data set by name, and ``datasets`` is not installed.
    """
    path = Path(source.name).expanduser()
    table = _read_file(path, source) if path.suffix.lower() in _FILES or path.is_file() else _read_data_set(source)
    if not table.rows:
        raise DataError(f"{table.name} has no rows.")
    return table


# -- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, source: Source) -> Table:
    suffix = path.suffix.lower()
    if suffix not in _FILES:
        raise DataError(f"{path} is of an unknown kind; data files end in {', '.join(_FILES)}.")
    if source.split is not None:
        raise DataError(f"{path} is a file, which has no split {source.split!r}; leave the split out.")
    encoding = "utf-8-sig" if source.encoding.lower() in ("utf-8", "utf8") else source.encoding
    try:
        with path.open(encoding=encoding, newline="") as file:
            if suffix in (".csv", ".tsv"):
                return _read_csv(file, path, source)
            return _read_json(file, path)
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except LookupError:
        raise DataError(f"There is no encoding {source.encoding!r}; usual ones are utf-8 and latin-1.") from None
    except UnicodeError as e:
        raise DataError(
            f"{path} is not {source.encoding.removesuffix('-sig')}: {_undecoded(path, source, e)}"
        ) from None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}.") from None


def _undecoded(path: Path, source: Source, error: UnicodeError) -> str:
    """What cannot be decoded, and with which encoding it might be."""
    with path.open("rb") as file:
        beginning = file.read(2)
    if beginning in (b"\xff\xfe", b"\xfe\xff"):
        return f"it begins with the mark of UTF-16. Say so: {option('encoding', 'utf-16')}."
    reason = getattr(error, "reason", None) or str(error)
    return (
        f"{_bad_line(path, source.encoding)} cannot be decoded ({reason}). Name its encoding, such as "
        f"{option('encoding', 'latin-1')}."
    )


def _bad_line(path: Path, encoding: str) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return f"line {number}"
    return "a part of it"


def _read_csv(file: IO[str], path: Path, source: Source) -> Table:
    tab = path.suffix.lower() == ".tsv"
    quoted = not tab if source.quoting is None else source.quoting
    quoting: _Quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(_LARGEST_FIELD)
    delimiter = _delimiter(file, "\t" if tab else ",", quoting)
    if delimiter != ("\t" if tab else ","):
        logger.warning("The fields of %s are separated by %s; it is read so.", path, _DELIMITERS[delimiter])
    lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(lines, None)
        if header is None:
            raise DataError(f"{path} is empty.")
        _check_header(header, path)
        rows = tuple(_csv_row(values, header, path, lines.line_num) for values in lines if values)
    except csv.Error as e:
        how = option("quoting", not quoted)
        raise DataError(f"Line {lines.line_num} of {path} cannot be read: {e}. Try it with {how}.") from None
    finally:
        csv.field_size_limit(limit)
    return Table(str(path), tuple(header), rows)


def _delimiter(file: IO[str], usual: str, quoting: _Quoting) -> str:
    """What stands between fields: the usual one, unless the first rows have as many fields as the header by another
    alone."""
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        file.seek(0)
        try:
            rows = [row for row in islice(csv.reader(file, delimiter=delimiter, quoting=quoting), _SNIFFED) if row]
        except csv.Error:
            rows = []
        if rows and len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            break
    else:
        delimiter = usual
    file.seek(0)
    return delimiter


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"The header of {path} has {', '.join(map(repr, twice))} more than once; rename one of them.")


def _csv_row(values: list[str], header: list[str], path: Path, line: int) -> Row:
    if len(values) != len(header):
        raise DataError(
            f"Line {line} of {path} has {len(values)} fields, but its header has {len(header)}. A field that holds the "
            f"separator must stand in quotes; {option('quoting', True)} or {option('quoting', False)} says whether "
            "quotes enclose fields."
        )
    return Row(f"line {line} of {path}", dict(zip(header, values, strict=True)))


def _read_json(file: IO[str], path: Path) -> Table:
    beginning = file.read(1).strip()
    file.seek(0)
    entries = _json_array(file, path) if beginning == "[" else _json_lines(file, path)
    rows = tuple(Row(place, _object(value, place)) for place, value in entries)
    columns = dict.fromkeys(name for row in rows for name in row.values)  # those of any row, in order
    return Table(str(path), tuple(columns), rows)


def _json_array(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.load(file)
    except json.JSONDecodeError as e:
        raise DataError(f"Line {e.lineno} of {path} is not valid JSON: {e.msg}.") from None
    yield from ((f"entry {i} of {path}", entry) for i, entry in enumerate(entries, 1))


def _json_lines(file: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number} of {path}", json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(
                f"Line {number} of {path} is not valid JSON: {e.msg} at column {e.colno}. Each line must be one object."
            ) from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"There is no JSON object in {place}, but {json.dumps(value)[:40]}.")
    return value


# -- data sets by name -----------------------------------------------------------------------------------------------


def _read_data_set(source: Source) -> Table:
    name, _, config = source.name.partition(":")
    local = Path(source.name).expanduser()
    if not local.exists() and (source.name.startswith((".", "~", "/")) or source.name.count("/") > 1):
        raise DataError(f"There is no file or folder {source.name}.")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", f"Reading {source.name}, which is no file,") from None
    try:
        loaded = _load(datasets, local) if local.is_dir() else datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(f"The data set {source.name!r} could not be loaded: {_first_line(e)}") from e
    chosen = _split(loaded, source)
    names = {c: tuple(f.names) for c, f in chosen.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = tuple(Row(f"row {i} of {source.name}", values) for i, values in enumerate(chosen))
    return Table(source.name, tuple(chosen.column_names), rows, names)


def _load(datasets: Any, folder: Path) -> Any:
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))


def _split(loaded: Any, source: Source) -> Any:
    if not isinstance(loaded, dict):  # one split alone, as `Dataset.save_to_disk` writes it
        return loaded
    wanted = source.split or "train"
    if wanted not in loaded:
        raise DataError(f"{source.name} has no split {wanted!r}; it has {', '.join(loaded)}.")
    return loaded[wanted]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
