"""Texts of unequal lengths into batches of about equal work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prunepass.bulk.encoding import Encoded

__all__ = ["Batch", "batches", "rounded"]

#: widths are multiples of it: fewer shapes, for each of which a runtime prepares itself anew
STEP = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts that run in one call.

    Attributes:
        numbers: of the texts, in the order of the rows.
        texts: encoded.
        width: tokens of each row, padding included.
        rows: of the arrays; more than there are texts where the model has a fixed batch.
    """

    numbers: Sequence[int]
    texts: Sequence[Encoded]
    width: int
    rows: int


def batches(
    texts: Sequence[tuple[int, Encoded]],
    tokens: int,
    *,
    longest: int | None = None,
    length: int | None = None,
    rows: int | None = None,
) -> Iterator[Batch]:
    """The texts, longest first, as many at a time as make up about ``tokens`` tokens, padding included.

    Each width has one number of rows but for the last batch, so there are few shapes.

    Args:
        texts: with their numbers.
        tokens: in a batch; a longer text has a batch to itself.
        longest: that the model takes, up to which widths are rounded.
        length: of every row, where it is fixed.
        rows: in every batch, where it is fixed.
    """
    order = sorted(texts, key=lambda pair: (-len(pair[1].ids), pair[0]))
    at = 0
    while at < len(order):
        width = length or rounded(len(order[at][1].ids), longest)
        size = rows or max(1, tokens // width)
        taken = order[at : at + size]
        yield Batch([number for number, _ in taken], [text for _, text in taken], width, rows or len(taken))
        at += size


def rounded(length: int, longest: int | None) -> int:
    """A width for so many tokens: a multiple of `STEP`, but no more than the model takes."""
    width = -(-length // STEP) * STEP
    return width if longest is None else max(length, min(width, longest))
