"""Tokenised examples, and the collator that pads them to batches."""

from __future__ import annotations

import logging
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prunepass.errors import DataError, option
from prunepass.training.data.heads import Head, Kind
from prunepass.training.data.labels import Answer
from prunepass.training.data.metrics import IGNORED
from prunepass.training.data.rows import Example, Examples

__all__ = ["Features", "build_dataset", "checked_length", "data_collator"]

logger = logging.getLogger(__name__)

Feature = dict[str, Any]

#: texts are cut to this many tokens, however many a model takes, unless more are asked for
DEFAULT_MAX_LENGTH = 512
_STEP = 8  # widths of batches: one compiled graph serves more of them, and matrix units like them


@dataclass(frozen=True)
class Features(Dataset[Feature]):
    """Tokenised texts, each a mapping as the transformers collators take it.

    Attributes:
        cut: how many texts were longer than ``max_length`` and lost their end.
        max_length: the most tokens a row has.
    """

    rows: tuple[Feature, ...] = field(repr=False)
    max_length: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Feature:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [len(row["input_ids"]) for row in self.rows]


def checked_length(asked: int | None, most: int) -> int:
    """The number of tokens texts are cut to: what is asked for, or ``most`` and no more than 512.

    Raises:
        DataError: more is asked for than the model takes.
    """
    if asked is not None and asked > most:
        raise DataError(f"The model takes at most {most} tokens; {option('max_length')} asks for {asked}.")
    return asked or min(most, DEFAULT_MAX_LENGTH)


def build_dataset(
    examples: Examples,
    tokenizer: Any,
    head: Head,
    *,
    max_length: int,
    stride: int | None = None,
    warns: bool = True,
) -> Features:
    """Tokenise ``examples``. Texts of more than ``max_length`` tokens are cut; if ``warns``, one warning counts them.

    Contexts of questions are not cut: they become several rows that overlap by ``stride`` tokens (a third of
    ``max_length`` where left out); one in which the answer does not lie whole answers with its first token, as in
    BERT's own recipe for SQuAD. Words that are split carry their label at the first piece.

    Raises:
        DataError: the tokenizer cannot tell where its tokens stand in the text, which two of the heads need.
    """
    if head.kind in (Kind.QUESTION_ANSWERING, Kind.TOKEN_CLASSIFICATION) and not tokenizer.is_fast:
        raise DataError(f"Data for {head.kind} need a fast tokenizer; {type(tokenizer).__name__} is none.")
    if head.kind == Kind.QUESTION_ANSWERING:
        step = max_length // 3 if stride is None else stride
        features = _questions(examples, tokenizer, max_length, step)
    elif head.kind == Kind.TOKEN_CLASSIFICATION:
        features = _word_texts(examples, tokenizer, max_length)
    else:
        features = _texts(examples, tokenizer, max_length)
    if features.cut and warns:
        logger.warning(
            "%d of the %d texts in %s are longer than %d tokens and were cut; a larger %s, where the model has the "
            "positions, takes them whole.",
            features.cut,
            len(examples),
            examples.name,
            max_length,
            option("max_length"),
        )
    return features


def data_collator(head: Head, tokenizer: Any, *, max_length: int) -> Callable[[list[Feature]], dict[str, Tensor]]:
    """The transformers collator for ``head``: pads to the longest row of a batch, rounded up to a multiple of eight.

    Args:
        max_length: that of the `Features`; one that is no multiple of eight turns the rounding off, as a batch might
            become wider than the model's positions.

    Raises:
        DataError: a masked language model's tokenizer has no mask token, or one for questions pads on the left.
    """
    import transformers

    multiple = _STEP if max_length % _STEP == 0 else None
    if head.kind == Kind.MASKED_LM and tokenizer.mask_token is None:
        raise DataError("The tokenizer has no mask token, which training a masked language model takes.")
    if head.kind == Kind.QUESTION_ANSWERING and tokenizer.padding_side != "right":
        raise DataError('Places of answers count from the left: set padding_side="right" in the tokenizer\'s config.')
    if head.kind in (Kind.MASKED_LM, Kind.CAUSAL_LM):
        masked = head.kind == Kind.MASKED_LM
        made: Any = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=masked, pad_to_multiple_of=multiple)
        if masked:
            made = _SameMasks(made)
    elif head.kind == Kind.TOKEN_CLASSIFICATION:
        made = transformers.DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)
    else:
        made = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    return cast("Callable[[list[Feature]], dict[str, Tensor]]", made)


class _SameMasks:
    """A collator that draws by the batch's own tokens: what it masks is the same after resuming, and for all models
    that are compared on one batch."""

    def __init__(self, made: Callable[[list[Feature]], Any]) -> None:
        self._made = made

    def __call__(self, batch: list[Feature]) -> Any:
        ids = array("q", [token for row in batch for token in row["input_ids"]])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(ids.tobytes()))
            return self._made(batch)


# -- one text, or two ------------------------------------------------------------------------------------------------


def _texts(examples: Examples, tokenizer: Any, max_length: int) -> Features:
    inputs = _text_arguments(examples.rows)
    encoded = tokenizer(*inputs, truncation=True, max_length=max_length)
    rows = [_row(encoded, i) for i in range(len(examples))]
    for row, example in zip(rows, examples, strict=True):
        if example.label is not None:
            row["labels"] = example.label
    return Features(tuple(rows), max_length, _count_cut(examples, rows, tokenizer, max_length))


def _text_arguments(rows: Sequence[Example]) -> list[list[Any]]:
    first = [row.text if isinstance(row.text, str) else list(row.text) for row in rows]
    return [first] if rows[0].pair is None else [first, [row.pair for row in rows]]


def _row(encoded: Any, index: int) -> Feature:
    return {key: encoded[key][index] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}


def _count_cut(examples: Examples, rows: Sequence[Feature], tokenizer: Any, max_length: int) -> int:
    """How many texts lost something: of those that fill the row, the ones that are longer when left whole."""
    full = [example for example, row in zip(examples, rows, strict=True) if len(row["input_ids"]) == max_length]
    if not full:
        return 0
    words = isinstance(full[0].text, tuple)
    whole = tokenizer(*_text_arguments(full), truncation=False, is_split_into_words=words, verbose=False)
    return sum(len(ids) > max_length for ids in whole["input_ids"])


# -- words -----------------------------------------------------------------------------------------------------------


def _word_texts(examples: Examples, tokenizer: Any, max_length: int) -> Features:
    words = [list(example.text) for example in examples]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = [_row(encoded, i) for i in range(len(examples))]
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if isinstance(example.label, tuple):
            row["labels"] = list(_at_first_pieces(encoded.word_ids(i), example.label))
    return Features(tuple(rows), max_length, _count_cut(examples, rows, tokenizer, max_length))


def _at_first_pieces(word_ids: Sequence[int | None], labels: Sequence[Any]) -> Iterator[int]:
    before = None
    for word in word_ids:
        yield IGNORED if word is None or word == before else labels[word]
        before = word


# -- questions -------------------------------------------------------------------------------------------------------


def _questions(examples: Examples, tokenizer: Any, max_length: int, stride: int) -> Features:
    questions, cut = _short_questions(examples, tokenizer, max_length - stride - 8)
    encoded = tokenizer(
        questions,
        [example.pair for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = []
    for i, of in enumerate(encoded["overflow_to_sample_mapping"]):
        row = _row(encoded, i)
        label = examples.rows[of].label
        if isinstance(label, Answer):
            place = _tokens_of(label, encoded["offset_mapping"][i], encoded.sequence_ids(i))
            row["start_positions"], row["end_positions"] = place
        rows.append(row)
    return Features(tuple(rows), max_length, cut)


def _short_questions(examples: Examples, tokenizer: Any, most: int) -> tuple[list[str], int]:
    """The questions, cut where they leave a context no room to advance in; and how many were."""
    questions = [str(example.text) for example in examples]
    if most < 1:
        raise DataError(f"{option('max_length')} leaves no room for questions and contexts; raise it.")
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [offsets[most - 1][1] if len(offsets) > most else None for offsets in encoded["offset_mapping"]]
    return [text[:end] for text, end in zip(questions, ends, strict=True)], sum(end is not None for end in ends)


def _tokens_of(answer: Answer, offsets: Sequence[tuple[int, int]], sequence: Sequence[int | None]) -> tuple[int, int]:
    """First and last token of an answer; (0, 0) where there is none, or not all of it lies in this part."""
    context = [i for i, part in enumerate(sequence) if part == 1]
    end = answer.start + len(answer.text)
    inside = [i for i in context if offsets[i][0] < end and offsets[i][1] > answer.start]
    if not inside or offsets[context[0]][0] > answer.start or offsets[context[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]
