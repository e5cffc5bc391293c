"""FLOPs over a corpus of real lengths, against the three denominators that papers use without saying which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from prunepass.cost.flops import FlopCounter
from prunepass.errors import OptionError

__all__ = ["CorpusFlops", "corpus_flops"]


@dataclass(frozen=True)
class CorpusFlops:
    """FLOPs of one graph over a corpus, by how much padding is run along.

    Attributes:
        padded_to_max: every row padded to the model's (or the given) maximum.
        padded_to_batch: every batch padded to its longest row.
        real_tokens: every row alone at its own length; no padding at all.
    """

    padded_to_max: int
    padded_to_batch: int
    real_tokens: int

    def over(self, other: CorpusFlops) -> dict[str, float]:
        """How many times this costs ``other``, each against the same kind of padding."""
        mine, theirs = asdict(self), asdict(other)
        return {kind: mine[kind] / theirs[kind] if theirs[kind] else float("inf") for kind in mine}


def corpus_flops(
    counter: FlopCounter, lengths: Sequence[int], *, batch_size: int = 32, max_length: int | None = None
) -> CorpusFlops:
    """FLOPs of running a corpus in batches, in the order given.

    Args:
        lengths: live tokens of each row.
        batch_size: rows a batch; the last one may be smaller.
        max_length: length of the first denominator; the longest row where it is not given.

    Raises:
        OptionError: no lengths, a length below 1 or above ``max_length``, or a batch size below 1.
    """
    longest = _checked(lengths, batch_size, max_length)
    batches = list(_batches(lengths, batch_size))
    return CorpusFlops(
        padded_to_max=sum(counter.total(len(batch), longest) for batch in batches),
        padded_to_batch=sum(counter.total(len(batch), max(batch)) for batch in batches),
        real_tokens=sum(rows * counter.total(1, length) for length, rows in Counter(lengths).items()),
    )


def _checked(lengths: Sequence[int], batch_size: int, max_length: int | None) -> int:
    if not lengths:
        raise OptionError("The list of lengths is empty; give the number of live tokens of each row.")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}.")
    if min(lengths) < 1:
        raise OptionError(f"Every length must be at least 1; found {min(lengths)}.")
    if max_length is not None and max(lengths) > max_length:
        raise OptionError(
            f"The longest row has {max(lengths)} tokens, more than the maximum of {max_length}. Truncate the rows or "
            "raise max_length."
        )
    return max_length or max(lengths)


def _batches(lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(lengths), size):
        yield lengths[start : start + size]
