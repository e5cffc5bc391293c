"""What the tokenised rows and batches of training hold."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_heads import INPUTS, NUMBER, QA, TAGS, TOPICS, TWO

from prunepass.errors import DataError
from prunepass.training.data.features import build_dataset, checked_length, data_collator
from prunepass.training.data.heads import (
    CausalLM,
    Embedding,
    Head,
    MaskedLM,
)
from prunepass.training.data.labels import Answer
from prunepass.training.data.rows import Example, Examples
from vocabulary import PIECES, tiny_tokenizer

# -- features --------------------------------------------------------------------------------------------------------


def features(head: Head, *rows: Example, max_length: int = 64, **options: Any) -> Any:
    return build_dataset(Examples("x.csv", rows, True), tiny_tokenizer(), head, max_length=max_length, **options)


def pieces(row: dict[str, Any]) -> list[str]:
    return [PIECES[i] for i in row["input_ids"]]


def test_texts_are_cut_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Example("the " * n, None, 1) for n in (3, 6, 7, 30)]
    found = features(TWO, *rows, max_length=8)
    assert found.lengths == [5, 8, 8, 8]
    assert found.cut == 2  # the row of six fills 8 places without a loss
    assert [r.message.split(" are")[0] for r in caplog.records] == ["2 of the 4 texts in x.csv"]
    assert caplog.records[0].levelno == logging.WARNING


def test_pairs_have_two_segments() -> None:
    row = features(TWO, Example("the cat", "sat", 0))[0]
    assert pieces(row) == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert row["labels"] == 0


def test_words_are_labelled_at_their_first_piece() -> None:
    row = features(TAGS, Example(("the", "cats", "sat"), None, (0, 1, 2)))[0]
    assert pieces(row) == ["[CLS]", "the", "cat", "##s", "sat", "[SEP]"]
    assert row["labels"] == [-100, 0, 1, -100, 2, -100]


def test_cut_words_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = features(TAGS, Example(("the",) * 9, None, (0,) * 9), max_length=8)
    assert found.lengths == [8]
    assert found.cut == 1
    assert "1 of the 1 texts" in caplog.text


def test_answers_are_found_again_in_the_tokens() -> None:
    context = "the cat sat on the mat ."
    row = features(QA, Example("who ?", context, Answer(context.index("cat sat"), "cat sat")))[0]
    assert pieces(row)[row["start_positions"] : row["end_positions"] + 1] == ["cat", "sat"]


def test_long_contexts_become_several_rows_that_overlap() -> None:
    words = ["the"] * 20 + ["cat", "sat"] + ["mat"] * 20
    context = " ".join(words)
    found = features(QA, Example("who ?", context, Answer(context.index("cat"), "cat sat")), max_length=24, stride=6)
    assert len(found) > 2
    assert found.cut == 0
    answered = [r for r in found.rows if r["start_positions"]]
    assert 1 <= len(answered) < len(found)
    for row in answered:
        assert pieces(row)[row["start_positions"] : row["end_positions"] + 1] == ["cat", "sat"]
    for row in found.rows:
        if row not in answered:
            assert (row["start_positions"], row["end_positions"]) == (0, 0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["the", "cats", "sat", "mat", "."]), min_size=1, max_size=60), st.data())
def test_every_answer_lies_whole_in_some_row(words: list[str], data: st.DataObject) -> None:
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = min(len(words), first + data.draw(st.integers(1, 3)))
    text = " ".join(words[first:last])
    start = len(" ".join(words[:first])) + bool(first)
    rows = features(QA, Example("who ?", context, Answer(start, text)), max_length=32, stride=12).rows
    expected = [p for word in words[first:last] for p in (["cat", "##s"] if word == "cats" else [word])]
    spans = [pieces(r)[r["start_positions"] : r["end_positions"] + 1] for r in rows if r["start_positions"]]
    assert expected in spans
    assert all(span == expected for span in spans)


def test_a_question_longer_than_a_row_leaves_room_for_its_context() -> None:
    found = features(QA, Example("who " * 80, "the cat", Answer(4, "cat")), max_length=32)
    assert found.cut == 1
    assert max(found.lengths) <= 32
    assert pieces(found[0])[found[0]["start_positions"]] == "cat"


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    assert checked_length(None, 64) == 64
    assert checked_length(None, 8192) == 512
    assert checked_length(8192, 8192) == 8192
    with pytest.raises(DataError, match="at most 64 tokens; max_length asks for 65"):
        checked_length(65, 64)


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "rows", "shape", "dtype"),
    [
        (TWO, (Example("the", None, 1), Example("the cat", None, 0)), (2,), torch.int64),
        (NUMBER, (Example("the", None, 0.5), Example("the cat", None, 1.0)), (2,), torch.float32),
        (TOPICS, (Example("the", None, (0.0, 1.0, 1.0)), Example("a", None, (0.0, 0.0, 0.0))), (2, 3), torch.float32),
        (TAGS, (Example(("the",), None, (1,)), Example(("a", "b"), None, (0, 2))), (2, 8), torch.int64),
        (MaskedLM(INPUTS), (Example("the"), Example("the cat")), (2, 8), torch.int64),
        (CausalLM(INPUTS), (Example("the"), Example("the cat")), (2, 8), torch.int64),
    ],
    ids=lambda value: value.kind if isinstance(value, Head) else "",
)
def test_batches(head: Head, rows: tuple[Example, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch = data_collator(head, tiny_tokenizer(), max_length=64)(list(features(head, *rows).rows))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].shape == shape
    assert batch["labels"].dtype == dtype
    assert head.has_labels(batch)
    assert batch["attention_mask"].sum(1).tolist() == features(head, *rows).lengths


def test_batches_do_not_grow_over_the_positions() -> None:
    rows = list(features(TWO, Example("the " * 40, None, 1), max_length=30).rows)
    assert data_collator(TWO, tiny_tokenizer(), max_length=30)(rows)["input_ids"].shape == (1, 30)


def test_an_embedding_batch_has_no_labels() -> None:
    head = Embedding(INPUTS)
    batch = data_collator(head, tiny_tokenizer(), max_length=64)(list(features(head, Example("the")).rows))
    assert set(batch) == set(INPUTS)
    assert not head.has_labels(batch)


def test_tokenizers_that_will_not_do() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(DataError, match="no mask token"):
        data_collator(MaskedLM(INPUTS), tokenizer, max_length=64)
    with pytest.raises(DataError, match="padding_side"):
        data_collator(QA, tiny_tokenizer(padding_side="left"), max_length=64)
