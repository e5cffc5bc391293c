"""From plain examples to rows of token ids, by the kind of task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.accuracy.data import Example
from prunepass.errors import OptionError
from prunepass.training.data.metrics import IGNORED

Kind = Literal["classification", "regression", "reranking", "token-classification", "question-answering", "embedding"]
Row = dict[str, Any]
Spans = list[Any]  # one value a token, None where the token is no part of the text

#: tokens that a cut leaves at least: [CLS] and [SEP], with something of the text between
SHORTEST = 5
#: neighbouring windows of a long context share a third of their tokens (as in BERT's SQuAD script: 128 of 384)
OVERLAP = 3


@dataclass(frozen=True)
class Features:
    """Rows of token ids that belong to examples; a map-style data set of the rows.

    Attributes:
        examples: what the rows were made from.
        rows: lists ready for transformers' data collators: ``input_ids``, ``attention_mask``, ``token_type_ids`` where
            the tokenizer gives them, and ``labels`` or ``start_positions``, ``end_positions`` where there are labels.
        owners: index of the example that each row is made from. Several rows may have one owner.
        spans: for every row and token, where in the example it comes from: the index of the word in the document
            (first pieces only), or the (start, end) characters of the context; None for any other token. Empty for
            kinds that need none.
    """

    examples: Sequence[Example]
    rows: list[Row]
    owners: list[int]
    spans: list[Spans]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]


def encode(
    kind: Kind,
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    *,
    cut: int | None = None,
    tags: Sequence[str] = (),
) -> Features:
    """Rows of at most ``max_length`` tokens.

    Args:
        tokenizer: a fast tokenizer that frames a text as ``[CLS] text [SEP]``.
        cut: keep only this many tokens of each row; with a question, only the first window of its context. Pairs are
            cut from the longer part. This is the baseline that reads less of the text.
        tags: names of the tags, for token classification.

    Raises:
        OptionError: ``cut`` is below `SHORTEST` or above ``max_length``.
    """
    if cut is not None and not SHORTEST <= cut <= max_length:
        raise OptionError(f"The cut must be between {SHORTEST} and {max_length} tokens, not {cut}.")
    if kind == "token-classification":
        return _encode_documents(examples, tokenizer, max_length, cut, tags)
    if kind == "question-answering":
        return _encode_questions(examples, tokenizer, max_length, cut)
    features = _encode_texts(examples, tokenizer, cut or max_length)
    if kind == "reranking":  # yes or no, of one class
        for row in features.rows:
            row["labels"] = [row["labels"]]
    return features


def _encode_texts(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Features:
    texts = [example["text"] for example in examples]
    seconds = [example["second"] for example in examples] if examples and "second" in examples[0] else None
    encoded = tokenizer(texts, seconds, truncation="longest_first", max_length=max_length)
    rows = _rows(encoded, tokenizer)
    for row, example in zip(rows, examples, strict=True):
        if "label" in example:
            row["labels"] = example["label"]
    return Features(examples, rows, list(range(len(rows))), [])


# -- documents of tagged words ---------------------------------------------------------------------------------------


def _encode_documents(
    examples: Sequence[Example], tokenizer: Any, max_length: int, cut: int | None, tags: Sequence[str]
) -> Features:
    index = {tag: i for i, tag in enumerate(tags)}
    features = Features(examples, [], [], [])
    for owner, example in enumerate(examples):
        names = [tag for sentence in example["tags"] for tag in sentence]
        for pieces in _packed(example["sentences"], tokenizer, max_length - 2):
            ids, words = zip(*pieces[: (cut or max_length) - 2], strict=True)
            spans = [None, *_first_pieces(words), None]
            features.rows.append(
                {
                    **_framed(ids, tokenizer),
                    "labels": [IGNORED if word is None else index[names[word]] for word in spans],
                }
            )
            features.owners.append(owner)
            features.spans.append(spans)
    return features


def _packed(sentences: Sequence[Sequence[str]], tokenizer: Any, room: int) -> Iterator[list[tuple[int, int]]]:
    """(piece, index of its word in the document) of as many whole sentences as fit into ``room`` pieces."""
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False)
    packed: list[tuple[int, int]] = []
    before = 0
    for i, sentence in enumerate(sentences):
        words = (before + word for word in encoded.word_ids(i))
        pieces = list(zip(encoded["input_ids"][i], words, strict=True))[:room]
        if packed and len(packed) + len(pieces) > room:
            yield packed
            packed = []
        packed += pieces
        before += len(sentence)
    yield packed


def _first_pieces(words: Sequence[int]) -> list[int | None]:
    return [word if i == 0 or words[i - 1] != word else None for i, word in enumerate(words)]


def _framed(ids: Sequence[int], tokenizer: Any) -> Row:
    row = {"input_ids": [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]}
    row["attention_mask"] = [1] * len(row["input_ids"])
    if "token_type_ids" in tokenizer.model_input_names:
        row["token_type_ids"] = [0] * len(row["input_ids"])
    return row


# -- questions -------------------------------------------------------------------------------------------------------


def _encode_questions(examples: Sequence[Example], tokenizer: Any, max_length: int, cut: int | None) -> Features:
    windows: dict[str, Any] = {"truncation": "longest_first", "max_length": cut}
    if cut is None:
        windows = {
            "truncation": "only_second",
            "max_length": max_length,
            "stride": max_length // OVERLAP,
            "return_overflowing_tokens": True,
        }
    texts = ([example[key] for example in examples] for key in ("question", "context"))
    encoded = tokenizer(*texts, return_offsets_mapping=True, **windows)
    rows = _rows(encoded, tokenizer)
    owners = encoded.get("overflow_to_sample_mapping", list(range(len(rows))))
    spans = [
        [span if part == 1 else None for span, part in zip(offsets, encoded.sequence_ids(i), strict=True)]
        for i, offsets in enumerate(encoded["offset_mapping"])
    ]
    for row, owner, row_spans in zip(rows, owners, spans, strict=True):
        row["start_positions"], row["end_positions"] = _answer_tokens(examples[owner], row_spans)
    return Features(examples, rows, owners, spans)


def _answer_tokens(example: Example, spans: Spans) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), the [CLS], where the window doesn't hold all of it."""
    first, end = example["starts"][0], example["starts"][0] + len(example["answers"][0])
    inside = [i for i, span in enumerate(spans) if span is not None and span[0] < end and span[1] > first]
    if not inside or spans[inside[0]][0] > first or spans[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _rows(encoded: Any, tokenizer: Any) -> list[Row]:
    names = [name for name in tokenizer.model_input_names if name in encoded]
    return [dict(zip(names, values, strict=True)) for values in zip(*(encoded[name] for name in names), strict=True)]
