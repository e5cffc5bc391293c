"""Files of texts: their rows in any stretches, and what is refused of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from prunepass.bulk.rows import Row, read, stretches
from prunepass.bulk.sources import Columns, find_sources
from prunepass.errors import DataError

COLUMNS = Columns("text", None, None)


def rows_of(files: list[Path], columns: Columns = COLUMNS, size: int = 3) -> list[Row]:
    sources, columns = find_sources(files, columns)
    found = list(stretches(sources, size))
    assert all(sum(piece.rows for piece in one.pieces) == size for one in found[:-1])
    rows = [list(read(sources, columns, one)) for one in found]
    assert [len(part) for part in rows] == [one.documents for one in found]
    return [row for part in rows for row in part]


def write_csv(file: Path, records: list[list[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["id", "text"], *records])
    return file


def write_lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return file


def write_parquet(file: Path, group: int = 4, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=25), size=st.integers(1, 30), group=st.integers(1, 9))
def test_any_stretches_have_the_rows_of_the_whole(tmp_path: Path, texts: list[str], size: int, group: int) -> None:
    ids = [str(i) for i in range(len(texts))]
    files = [
        write_csv(tmp_path / "a.csv", [list(pair) for pair in zip(ids, texts, strict=True)]),
        write_lines(tmp_path / "b.jsonl", [{"text": t, "id": i} for i, t in zip(ids, texts, strict=True)]),
        write_parquet(tmp_path / "c.parquet", group, id=ids, text=texts),
    ]
    rows = rows_of(files, size=size)
    assert [row.text for row in rows] == 3 * texts
    assert [row.id for row in rows] == 3 * ids
    assert [row.number for row in rows] == 3 * list(range(len(texts)))
    assert not any(row.wrong for row in rows)


def test_text_files_have_a_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n  two words  \n \nthree")
    rows = rows_of([file], size=2)
    assert [(row.number, row.text) for row in rows] == [(0, "one"), (2, "two words"), (4, "three")]
    assert [row.id for row in rows] == [f"{file}:{number}" for number in (0, 2, 4)]


def test_ids_are_made_where_not_all_files_have_them(tmp_path: Path) -> None:
    one, two = write_parquet(tmp_path / "a.parquet", text=["x"], id=[7]), write_lines(tmp_path / "b.txt", ["y"])
    assert [row.id for row in rows_of([one])] == [7]
    assert [row.id for row in rows_of([one, two])] == [f"{one}:0", f"{two}:0"]


def test_folders_are_read_in_order_but_for_hidden_files(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a.txt", "_done.txt", ".part/y.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [name])
    assert [row.text for row in rows_of([tmp_path])] == ["a.txt", "b/x.txt"]


def test_what_is_wrong_with_a_row_is_said_of_the_row(tmp_path: Path) -> None:
    lines = ['{"id": 1, "text": "a"}', "{broken", '["no object"]', '{"text": "b"}', '{"id": "x", "text": "c"}']
    rows = rows_of([write_lines(tmp_path / "a.jsonl", [*lines, {"id": 2**64, "text": "d"}, {"id": True}, {"id": 5}])])
    assert [row.wrong for row in rows] == [
        None,
        "is no JSON object",
        "is no JSON object",
        "has no id",
        "has an id of type str, and the first one is a whole number",
        "has an id that needs more than 64 bits",
        "has an id of type bool, and the first one is a whole number",
        None,
    ]
    assert rows[1].text == "{broken"
    assert rows[7].text is None
    file = tmp_path / "b.csv"
    file.write_bytes(b'text,id\n"a, b",1\nonly\n,2\nbad \xff,3\nx,\n')
    rows = rows_of([file])
    assert [(row.id, row.text, row.wrong) for row in rows] == [
        ("1", "a, b", None),
        (None, "only", "has 1 fields, and the header 2"),
        ("2", None, None),
        ("3", "bad \udcff", None),
        (None, "x", "has no id"),
    ]


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    column = pa.array([b"fine", None, b"bad \xff"], pa.binary()).view(pa.string())
    rows = rows_of([write_parquet(tmp_path / "a.parquet", text=column)])
    assert [row.text for row in rows] == ["fine", None, "bad \udcff"]


def test_categories_are_texts(tmp_path: Path) -> None:
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    assert [row.text for row in rows_of([write_parquet(tmp_path / "a.parquet", text=column)])] == ["a", "b", "a"]


class TestRefusals:
    def refused(self, said: str, *files: Path, **columns: Any) -> None:
        with pytest.raises(DataError, match=said):
            rows_of(list(files), Columns(**{"text": "text", "pair": None, "id": None} | columns))

    def test_files(self, tmp_path: Path) -> None:
        self.refused("no file .*none.txt", tmp_path / "none.txt")
        (tmp_path / "a.txt.gz").touch()
        self.refused(r"a.txt.gz is of no known kind.*decompress", tmp_path / "a.txt.gz")
        self.refused(r"The folder .* has no file that ends in \.parquet", tmp_path)
        file = write_lines(tmp_path / "a.txt", ["x"])
        self.refused("a.txt is given twice", tmp_path, file)
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
        self.refused(r"a.parquet cannot be read: [^\n]*$", tmp_path / "a.parquet")

    def test_columns(self, tmp_path: Path) -> None:
        table = write_parquet(tmp_path / "a.parquet", body=["x"], size=[1], share=[0.5])
        self.refused(
            r"a.parquet has no column 'text'; there are 'body', 'size', 'share'. Choose one with column", table
        )
        self.refused("'size' of .*a.parquet is of type int64, and no text", table, text="size")
        self.refused("no column 'key'.*with id", table, text="body", id="key")
        self.refused("no column 'query'.*with pair", table, text="body", pair="query")
        self.refused("'share' of .* double; ids are whole numbers or text", table, text="body", id="share")
        self.refused("b.jsonl has no column 'text'; there are 'body'", write_lines(tmp_path / "b.jsonl", [{"body": 1}]))
        self.refused(
            "c.csv has no column 'body'; there are 'id', 'text'", write_csv(tmp_path / "c.csv", []), text="body"
        )
        lines = write_lines(tmp_path / "d.txt", ["x"])
        self.refused("d.txt has texts and no column 'key'; leave out id", lines, id="key")
        self.refused("d.txt has one text a line; pairs", lines, pair="b")

    def test_ids_of_two_types(self, tmp_path: Path) -> None:
        one = write_parquet(tmp_path / "a.parquet", text=["x"], id=[1])
        two = write_csv(tmp_path / "b.csv", [["1", "x"]])
        self.refused(r"Ids in .*a.parquet are of type int64, and in .*b.csv of type string", one, two)

    def test_quotes_that_are_never_closed(self, tmp_path: Path) -> None:
        file = tmp_path / "a.csv"
        file.write_text('text\nfine\n"open\nand on\n')
        self.refused(r"a.csv is no CSV that can be read: unexpected end of data \(line 4\). Mend it", file)

    def test_a_file_that_changes(self, tmp_path: Path) -> None:
        file = write_lines(tmp_path / "a.txt", ["x"])
        sources, columns = find_sources([file], COLUMNS)
        (one,) = stretches(sources, 5)
        write_lines(file, ["x", "y"])
        with pytest.raises(DataError, match=r"a.txt has changed since the run began"):
            list(read(sources, columns, one))
        file.unlink()
        with pytest.raises(DataError, match=r"a.txt, which is read, is gone"):
            list(read(sources, columns, one))
