"""Data for training: what is read from files, what is refused and how, and what the tokenised rows hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_heads import INPUTS, NUMBER, QA, TAGS, TOPICS, TWO

from prunepass.errors import DataError, MissingExtraError, OptionError
from prunepass.training.data.heads import (
    Embedding,
    Head,
    MaskedLM,
)
from prunepass.training.data.labels import Answer
from prunepass.training.data.options import Source
from prunepass.training.data.rows import Example, Examples, check_count, compare_labels, load_examples, train_eval_split


@pytest.fixture(name="write")
def _write(tmp_path: Path) -> Any:
    def write(name: str, content: str | bytes | list[Any]) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refused(source: Source | str, head: Head = TWO) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, head)
    return str(caught.value)


# -- files -----------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_newlines_and_a_byte_order_mark(write: Any) -> None:
    path = write("a.csv", '\ufeffText,Label\n"a, ""b""\nc",good\n\nd,0\n')
    assert load_examples(path, TWO).rows == (Example('a, "b"\nc', None, 1), Example("d", None, 0))


def test_tsv_keeps_quotes_as_text_unless_told_otherwise(write: Any) -> None:
    path = write("a.tsv", 'text\tlabel\n"a" cat\t1\n')
    assert load_examples(path, TWO).rows[0].text == '"a" cat'
    quoted = write("b.tsv", 'text\tlabel\n"a\tcat"\t1\n')
    assert load_examples(Source(quoted, quoting=True), TWO).rows[0].text == "a\tcat"


def test_json_lines_and_json_arrays_read_alike(write: Any) -> None:
    rows = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": "BAD"}]
    expected = (Example("a", None, 1), Example("b", None, 0))
    assert load_examples(write("a.jsonl", rows), TWO).rows == expected
    assert load_examples(write("a.json", rows), TWO).rows == expected
    assert load_examples(write("b.json", json.dumps(rows)), TWO).rows == expected


def test_fields_longer_than_csv_takes_by_default(write: Any) -> None:
    import csv

    limit = csv.field_size_limit()
    assert len(str(load_examples(write("a.csv", "text,label\n" + "x" * 200_000 + ",1\n"), TWO).rows[0].text)) == 200_000
    assert csv.field_size_limit() == limit


def test_another_encoding(write: Any) -> None:
    path = write("a.csv", "text,label\na,1\ncaf\xe9,1\n".encode("latin-1"))
    message = refused(path)
    assert "is not utf-8: line 3 cannot be decoded" in message
    assert "latin-1" in message
    assert load_examples(Source(path, encoding="latin-1"), TWO).rows[1].text == "caf\xe9"
    assert "no encoding 'utf-9'" in refused(Source(path, encoding="utf-9"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text;label\na, and b;good\nc;0\n"),
        ("a.csv", "text\tlabel\na, and b\tgood\nc\t0\n"),
        ("a.csv", 'text;label\n"a, and b";good\n"c";0\n'),
        ("a.csv", 'text,label\n"a, and b",good\nc,0\n'),
        ("a.tsv", "text,label\n"),
    ],
)
def test_fields_between_other_separators(write: Any, name: str, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(name, content)
    if content == "text,label\n":
        assert "has no rows" in refused(path)
        return
    assert load_examples(path, TWO).rows == (Example("a, and b", None, 1), Example("c", None, 0))
    assert ("separated by" in caplog.text) is ("," not in content.splitlines()[0])


def test_a_separator_within_texts_is_none(write: Any) -> None:
    path = write("a.csv", "text,label\na; b; c,1\nd; e,0\n")
    assert load_examples(path, TWO).rows[0].text == "a; b; c"
    assert load_examples(write("b.csv", "text\na; b\nc\n"), MaskedLM(INPUTS)).rows[0].text == "a; b"


def test_utf_16_is_named(write: Any) -> None:
    path = write("a.csv", "text,label\na,1\n".encode("utf-16"))
    assert "encoding='utf-16'" in refused(path)
    assert load_examples(Source(path, encoding="utf-16"), TWO).rows == (Example("a", None, 1),)
    marked = write("b.csv", "\ufefftext,label\na,1\n")
    assert load_examples(Source(marked, encoding="UTF-8"), TWO).rows == (Example("a", None, 1),)


def test_the_nearest_column_is_suggested(write: Any) -> None:
    path = write("a.csv", "Sentence,label\na,1\n")
    assert "Did you mean 'Sentence'?" in refused(Source(path, text="sentense"))


def test_rows_without_text_are_left_out_and_counted(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.csv", "text,label\na,1\n ,0\nb,0\n,1\n")
    assert [row.text for row in load_examples(path, TWO)] == ["a", "b"]
    assert "2 rows without text are left out, the first in line 3 of" in caplog.text
    assert "All 2 texts in" in refused(write("b.csv", "text,label\n ,0\n ,1\n"))


def test_labels_that_say_nothing_are_warned_of(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    one = load_examples(write("a.csv", "text,label\n" + "a,1\n" * 9), TWO)
    assert "All 9 labels in" in caplog.text
    assert "'good'" in caplog.text
    both = load_examples(write("b.csv", "text,label\n" + "a,1\nb,0\n" * 5), TWO)
    caplog.clear()
    compare_labels(both, one, TWO)
    assert not caplog.records
    compare_labels(one, both, TWO)
    assert caplog.records[0].message.endswith("the data to train on do not: bad.")


def test_too_few_examples_are_refused_and_few_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def made(count: int) -> Examples:
        return Examples("x.csv", tuple(Example(str(i)) for i in range(count)), False)

    with pytest.raises(DataError, match=r"x\.csv leaves 2 examples to train on"):
        check_count(made(2), made(1))
    check_count(made(400), made(100))
    assert not caplog.records
    check_count(made(8), made(100))
    assert "leaves 8 examples" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "The label nan in line 1 of"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "text,label,text\na,1,b\n", "'text' more than once"),
        ("a.csv", "text,label\na,b,1\n", "Line 2 of"),
        ("a.csv", 'text,label\na,1\n"b" c,1\n', "Line 3 of"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "Line 2 of"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', "no JSON object in line 2"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "Line 2 of"),
        ("a.json", '[{"text": "a", "label": 1}, 3]', "no JSON object in entry 2"),
        ("a.txt", "a\n", "of an unknown kind; data files end in .csv"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(write: Any, name: str, content: str, said: str) -> None:
    assert said in refused(write(name, content))


@pytest.mark.parametrize("name", ["/no/such/file.csv", "no-such.jsonl", "./none", "~/none/of/this"])
def test_a_missing_file_is_named(name: str) -> None:
    assert "There is no file" in refused(name)


def test_a_file_has_no_split(write: Any) -> None:
    assert "no split 'test'" in refused(Source(write("a.csv", "text,label\na,1\n"), split="test"))


# -- data sets -------------------------------------------------------------------------------------------------------


def test_a_data_set_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"prunepass\[train\]"):
        load_examples("owner/name", TWO)


def test_a_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["Good", "Bad"])  # the other way round than the model has them
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "set"))
    source = Source(str(tmp_path / "set"))
    assert load_examples(source, TWO).rows == (Example("a", None, 1), Example("b", None, 0))
    assert len(load_examples(Source(source.name, split="test"), TWO)) == 1
    assert "has no split 'dev'; it has train, test" in refused(Source(source.name, split="dev"))


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "text", "pair"),
    [
        (("label", "text"), "text", None),
        (("sentence", "idx", "label"), "sentence", None),
        (("Premise", "hypothesis", "label"), "Premise", "hypothesis"),
        (("index", "sentence1", "sentence2", "label"), "sentence1", "sentence2"),
    ],
)
def test_usual_names_are_found(write: Any, columns: tuple[str, ...], text: str, pair: str | None) -> None:
    row = {name: 1 if name == "label" else f"<{name}>" for name in columns}
    example = load_examples(write("a.jsonl", [row]), TWO).rows[0]
    assert example == Example(f"<{text}>", pair and f"<{pair}>", 1)


def test_named_columns_come_first(write: Any) -> None:
    path = write("a.csv", "text,mine,other,label,class\na,b,c,0,1\n")
    assert load_examples(Source(path, "mine", None, "class"), TWO).rows == (Example("b", None, 1),)
    assert load_examples(Source(path, "mine", "other"), TWO).rows == (Example("b", "c", 0),)


def test_a_missing_column_is_told_with_those_there_are(write: Any) -> None:
    path = write("a.csv", "foo,label\na,0\n")
    assert "has no column 'bar' for the text; it has 'foo', 'label'" in refused(Source(path, text="bar"))
    assert "has no column 'bar' for the label; it has 'foo', 'label'" in refused(Source(path, "foo", label="bar"))
    message = refused(path)
    assert "no column with a usual name for the text" in message
    assert "text='COLUMN'" in message


def test_one_column_cannot_be_two(write: Any) -> None:
    with pytest.raises(OptionError, match="different columns"):
        Source("a.csv", "text", "text")


def test_labels_are_optional_and_their_absence_is_said(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    examples = load_examples(write("a.csv", "text,foo\na,0\n"), TWO)
    assert not examples.labelled
    assert examples.rows == (Example("a"),)
    assert "no label column" in caplog.text
    caplog.clear()
    assert not load_examples(write("b.csv", "text,foo\na,0\n"), Embedding(INPUTS)).labelled
    assert not caplog.records


def test_a_head_without_labels_takes_none(write: Any) -> None:
    path = write("a.csv", "text,label\na,0\n")
    assert load_examples(path, MaskedLM(INPUTS)).rows == (Example("a"),)
    assert "learns from no labels" in refused(Source(path, label="label"), MaskedLM(INPUTS))


def test_what_is_no_text_is_refused(write: Any) -> None:
    assert "is not text, but 3" in refused(write("a.jsonl", [{"text": "a", "label": 1}, {"text": 3, "label": 1}]))
    message = refused(write("a.jsonl", [{"text": "a", "label": 1}, {"label": 1}]))
    assert "There is no 'text' in line 2 of" in message


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2", "-1", "1e3"])
def test_labels_out_of_range(write: Any, label: str) -> None:
    message = refused(write("a.csv", f"text,label\na,1\nb,{label}\n"))
    assert f"The label {int(float(label))} in line 3 of" in message
    assert "2 classes, 0 to 1 (bad, good)" in message


@pytest.mark.parametrize("label", ["great", "", "0.5"])
def test_labels_that_are_no_class(write: Any, label: str) -> None:
    message = refused(write("a.csv", f"text,label\nb,{label}\n"))
    assert f"The label {label!r} in line 2 of" in message
    assert "none of the model's: bad, good" in message


@pytest.mark.parametrize("label", ["high", "", "nan", "inf"])
def test_scores_that_are_no_number(write: Any, label: str) -> None:
    assert f"The label {label!r} in line 2 of" in refused(write("a.csv", f"text,score\nb,{label}\n"), NUMBER)


def test_scores(write: Any) -> None:
    path = write("a.csv", "sentence1,sentence2,score\na,b,2.5\n")
    assert load_examples(path, NUMBER).rows == (Example("a", "b", 2.5),)


def test_several_labels_a_text(write: Any) -> None:
    rows = [["a", "c"], [1], [], "b|c", [0.0, 1.0, 1.0]]
    path = write("a.jsonl", [{"text": "x", "labels": labels} for labels in rows])
    found = [example.label for example in load_examples(path, TOPICS)]
    assert found == [(1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 1, 1), (0, 1, 1)]
    assert "The label 3 in line 1" in refused(write("b.jsonl", [{"text": "x", "labels": [3]}]), TOPICS)


def test_each_word_has_a_label(write: Any) -> None:
    row = {"tokens": ["The", "cats", "sat"], "ner_tags": [0, 1, 0]}
    assert load_examples(write("a.jsonl", [row]), TAGS).rows[0].label == (0, 1, 0)
    path = write("a.csv", "tokens,ner_tags\nThe cats sat,O B-CAT O\n")
    assert load_examples(path, TAGS).rows == (Example(("The", "cats", "sat"), None, (0, 1, 0)),)
    assert "3 words in line 1" in refused(write("b.jsonl", [row | {"ner_tags": [0]}]), TAGS)


def test_answers_in_all_their_forms(write: Any) -> None:
    base = {"question": "who ?", "context": "the cat sat"}
    squad = {"answers": {"text": ["cat"], "answer_start": [4]}}
    rows = [
        base | squad,
        base | {"answers": [{"text": "cat", "answer_start": 4}]},
        base | {"answers": {"text": [], "answer_start": []}},
    ]
    found = [example.label for example in load_examples(write("a.jsonl", rows), QA)]
    assert found == [Answer(4, "cat"), Answer(4, "cat"), Answer(0, "")]
    path = write("a.csv", "question,context,answer,answer_start\nwho ?,the cat sat,cat,4\n")
    assert load_examples(path, QA).rows == (Example("who ?", "the cat sat", Answer(4, "cat")),)
    wrong = base | {"answers": {"text": ["cat"], "answer_start": [5]}}
    assert "'cat' does not stand at character 5 of its context (line 1 of" in refused(write("b.jsonl", [wrong]), QA)
    assert "as in SQuAD" in refused(write("c.jsonl", [base | {"answers": 3}]), QA)


# -- splits ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_loses_nothing(count: int, share: float, seed: int) -> None:
    examples = Examples("x", tuple(Example(str(i)) for i in range(count)), False)
    train, held = train_eval_split(examples, share, seed)
    assert len(train) >= 1
    assert 1 <= len(held) <= max(1, round(share * count))
    assert sorted([*train.rows, *held.rows], key=lambda e: int(str(e.text))) == list(examples.rows)
    assert train_eval_split(examples, share, seed) == (train, held)


def test_what_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least 2"):
        train_eval_split(Examples("x", (Example("a"),), False), 0.1, 0)
