"""What pruning could give at most on a runtime: every block as fast as the dense model's own at the pruned length.

How long a block takes on n tokens cannot be timed alone: a block by itself pays for a call that in a model is shared by
all. So the whole dense model and the same model with one block are timed at n, and the difference is that of all
blocks but one::

    block(n) = (dense(n) - one(n)) / (blocks - 1)
    ideal    = one(S) - block(S) + sum over the blocks i of block(n_i)

The first part of the sum is what lies outside the blocks (embeddings, head, the call itself) at the full length S; with
all n_i = S the ideal is the dense time. Several choices keep noise and flattery out:

* The difference spans all blocks but one. Between models of two and of four blocks it would be as noisy and
  several times smaller, and the noise would be multiplied again by the number of blocks.
* Every block of the whole model has weights of its own. A call streams all of them through the caches as the pruned
  model does. The model with one block may find its weights there, but what does not hang on the length cancels: the
  times of that model enter the ideal with weights that add up to zero.
* Every timed call follows one of the same length, see `turns`: no way pays for a change of shapes.
* The dense model is the very one that is the baseline, on the same runtime, precision and kind of shapes, and its
  shorter lengths run in the same turns.

A model's blocks are taken alike: of one with two kinds of blocks, block(n) is the mean of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunepass.errors import OptionError


def lengths_to_time(length: int, *plans: Sequence[int]) -> list[int]:
    """Lengths at which both dense models must be timed, descending: the full one and those of each plan's blocks."""
    return sorted({length, *(n for lengths in plans for n in lengths)}, reverse=True)


def block_times(whole: Mapping[int, float], one: Mapping[int, float], blocks: int) -> dict[int, float]:
    """Time of one block by length.

    Args:
        whole: time of the dense model of so many ``blocks``, by length.
        one: of the same model with one block; has the same lengths.

    Raises:
        OptionError: the model has but one block, so there is nothing to take the difference of.
    """
    if blocks < 2:
        raise OptionError(f"The time of a block needs a model of at least 2 blocks, not {blocks}.")
    return {n: (whole[n] - one[n]) / (blocks - 1) for n in whole}


def ideal_time(
    whole: Mapping[int, float], one: Mapping[int, float], block_lengths: Sequence[int], length: int
) -> float:
    """The ideal time, in the unit of the times given.

    Args:
        block_lengths: tokens that each block of the pruned model runs on.
        length: of the unpruned row.
    """
    of_block = block_times(whole, one, len(block_lengths))
    return one[length] - of_block[length] + sum(of_block[n] for n in block_lengths)


def ideal_times(
    whole: Mapping[int, Sequence[float]], one: Mapping[int, Sequence[float]], lengths: Sequence[int], length: int
) -> list[float]:
    """`ideal_time` of each repeat, from the times of that repeat."""
    return [
        ideal_time({n: whole[n][i] for n in whole}, {n: one[n][i] for n in one}, lengths, length)
        for i in range(len(whole[length]))
    ]
