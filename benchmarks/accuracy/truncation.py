"""The baseline that a pruner must beat: the dense model on less of the text, at as many FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from benchmarks.accuracy.data import Example
from benchmarks.accuracy.features import SHORTEST, Features
from benchmarks.accuracy.metrics import predict
from benchmarks.accuracy.tasks import Task
from prunepass.cost import FlopCounter
from prunepass.graph.capture import capture_module

#: the benchmark's budgets: FLOPs on real tokens, as shares of the dense model's
SHARES = (Fraction(1, 2), Fraction(2, 5), Fraction(1, 3), Fraction(1, 4), Fraction(1, 8))
#: nearest to 1 / 2.43, the mean of ToP's results on GLUE; trained at half of the steps
MAIN_BUDGET = Fraction(2, 5)


@dataclass(frozen=True)
class Cut:
    """Rows cut at one length, the same for the whole test set.

    Attributes:
        length: tokens that longer rows are cut to.
        share: FLOPs, counted on real tokens, over those of the uncut rows.
    """

    length: int
    share: float


def find_cut(uncut: Sequence[int], lengths: Sequence[int], flops: Callable[[int], int], share: Fraction) -> Cut:
    """The longest cut whose FLOPs are at most ``share`` of the uncut rows', by bisection.

    Args:
        uncut: tokens of each row of the unabridged features (with a question, of all windows of its context).
        lengths: tokens of each row that is to be cut.
        flops: of one row of so many tokens; grows with it.

    Returns:
        where not even `SHORTEST` tokens are cheap enough, that cut: its `Cut.share` is then above ``share``.
    """
    dense = _total(uncut, flops)

    def share_of(cut: int) -> float:
        return _total([min(n, cut) for n in lengths], flops) / dense

    low, high = SHORTEST, max(SHORTEST, *lengths)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share_of(middle) <= share else (low, middle - 1)
    return Cut(low, share_of(low))


def truncation(
    task: Task, model: Any, tokenizer: Any, examples: Sequence[Example], shares: Sequence[Fraction] = SHARES
) -> dict[str, dict[str, float]]:
    """Figures of the dense model on cut texts, by share: the metric's, with ``cut`` (tokens) and ``flops`` (share).

    On very short texts a small share can't be met by cutting; ``flops`` then is above it.

    A text keeps its beginning, a pair loses from its longer part, a question's context is read in one window; words of
    a document behind the cut count as tagged O.
    """
    uncut = task.features(examples, tokenizer)
    lengths = task.features(examples, tokenizer, cut=task.max_length).lengths
    flops = flops_of_row(model, uncut, tokenizer)
    figures = {}
    for share in sorted(shares, reverse=True):
        cut = find_cut(uncut.lengths, lengths, flops, share)
        features = task.features(examples, tokenizer, cut=cut.length)
        scores = task.metric(predict(model, features, task.kind, tokenizer), features)
        figures[str(share)] = {"cut": cut.length, "flops": round(cut.share, 4), **scores}
    return figures


def flops_of_row(model: Any, features: Features, tokenizer: Any) -> Callable[[int], int]:
    """FLOPs of one row by its number of tokens, counted on the model's graph."""
    rows = [{name: row[name] for name in tokenizer.model_input_names} for row in features.rows[:2]]
    counter = FlopCounter(capture_module(model, dict(tokenizer.pad(rows, return_tensors="pt"))).graph_module)
    return lambda length: counter.total(1, length)


def _total(lengths: Sequence[int], flops: Callable[[int], int]) -> int:
    return sum(rows * flops(length) for length, rows in Counter(lengths).items())
