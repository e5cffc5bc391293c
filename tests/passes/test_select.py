"""Selection against a reference in plain Python: counts, protection, ties, order, positions, NaN."""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import harness
import oracle
from prunepass import Protect, PrunePlan, Stage
from prunepass.passes.live import live_tokens
from prunepass.passes.select import Selection, select, select_mask

keeps = st.fractions(min_value=Fraction(1, 20), max_value=1, max_denominator=20)
protects = st.builds(
    Protect,
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    token_ids=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    last_share=st.fractions(min_value=0, max_value=Fraction(1, 2), max_denominator=10),
)
# Few different values, so that ties are common; and what a broken predictor may give.
values = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, mask and ids of a small batch; live tokens may stand anywhere, and a row may have none."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))

    def table(element: st.SearchStrategy[Any]) -> list[list[Any]]:
        return draw(st.lists(st.lists(element, min_size=length, max_size=length), min_size=batch, max_size=batch))

    scores = torch.tensor(table(values), dtype=torch.float64)
    mask = torch.tensor(table(st.sampled_from([0, 1, 1])))
    return scores, mask, torch.tensor(table(st.integers(0, 5)))


def choose(scores: Tensor, mask: Tensor | None, ids: Tensor, keep: Any, protect: Protect) -> Selection:
    row = live_tokens(ids, mask, ids, protect)
    named = {"order": row.order, "count": row.count, "padding": row.padding}
    return select(scores, ids.shape[1], Stage(0, keep), protect, **named)


def spread(chosen: Selection, length: int) -> Tensor:
    """The [B, S] mask of the positions in live slots."""
    alive = torch.ones_like(chosen.positions, dtype=torch.bool) if chosen.alive is None else chosen.alive
    marks = torch.zeros(len(chosen.positions), length, dtype=torch.int64)
    marks.scatter_add_(1, chosen.positions, alive.to(torch.int64))
    assert int(marks.max()) <= 1, "a token was kept twice"
    return marks.bool()


@given(data=rows(), keep=keeps, protect=protects)
def test_gathering_keeps_the_tokens_of_the_reference(
    data: tuple[Tensor, Tensor, Tensor], keep: Fraction, protect: Protect
) -> None:
    scores, mask, ids = data
    chosen = choose(scores, mask, ids, keep, protect)
    expected = oracle.select_rows(scores, mask.bool(), mask.bool(), ids, keep, protect)
    assert torch.equal(spread(chosen, ids.shape[1]), expected)


@given(data=rows(), keep=keeps, protect=protects)
def test_slots_ascend_and_are_as_many_as_the_length_allows(
    data: tuple[Tensor, Tensor, Tensor], keep: Fraction, protect: Protect
) -> None:
    scores, mask, ids = data
    length = ids.shape[1]
    chosen = choose(scores, mask, ids, keep, protect)
    assert chosen.index.shape == (len(ids), max(1, oracle.count(length, keep, protect)))
    assert bool((chosen.index.diff(dim=1) > 0).all())
    assert bool((chosen.index >= 0).all() and (chosen.index < length).all())
    assert chosen.alive is not None
    for b in range(len(ids)):
        n = int(mask[b].sum())
        assert int(chosen.alive[b].sum()) == oracle.count(n, keep, protect)
        assert torch.equal(chosen.positions[b][chosen.alive[b]], chosen.index[b][chosen.alive[b]])
        surplus = chosen.positions[b][~chosen.alive[b]]
        assert not mask[b][surplus].any(), "a surplus slot must look like padding"


@given(data=rows(), keep=keeps, protect=protects)
def test_masking_chooses_the_same_tokens(data: tuple[Tensor, Tensor, Tensor], keep: Fraction, protect: Protect) -> None:
    scores, mask, ids = data
    row = live_tokens(ids, mask, ids, protect)
    named = {"order": row.order, "alive": row.alive, "count": row.count}
    kept = select_mask(scores, ids.shape[1], Stage(0, keep), protect, **named)
    assert torch.equal(kept, oracle.select_rows(scores, mask.bool(), mask.bool(), ids, keep, protect))


@given(data=rows(), pair=st.tuples(keeps, keeps), protect=protects)
def test_a_second_stage_chooses_among_the_kept_and_counts_the_original_tokens(
    data: tuple[Tensor, Tensor, Tensor], pair: tuple[Fraction, Fraction], protect: Protect
) -> None:
    scores, mask, ids = data
    live, length = mask.bool(), ids.shape[1]
    high, low = max(pair), min(pair)
    second_scores = scores.flip(1)
    first = choose(scores, mask, ids, high, protect)
    row = live_tokens(ids, mask, ids, protect)
    second = select(
        second_scores.gather(1, first.positions),
        length,
        Stage(1, low),
        protect,
        order=row.order.gather(1, first.positions),
        count=row.count,
        positions=first.positions,
        padding=row.padding,
    )
    after_first = oracle.select_rows(scores, live, live, ids, high, protect)
    assert torch.equal(spread(second, length), oracle.select_rows(second_scores, after_first, live, ids, low, protect))
    assert bool((second.index.diff(dim=1) > 0).all())


@given(data=rows(), keep=keeps, protect=protects)
def test_without_a_mask_every_token_is_live(
    data: tuple[Tensor, Tensor, Tensor], keep: Fraction, protect: Protect
) -> None:
    scores, _, ids = data
    everything = torch.ones_like(ids)
    expected = oracle.select_rows(scores, everything.bool(), everything.bool(), ids, keep, protect)
    assert torch.equal(spread(choose(scores, None, ids, keep, protect), ids.shape[1]), expected)
    assert torch.equal(spread(choose(scores, everything, ids, keep, protect), ids.shape[1]), expected)


@given(
    n=st.integers(1, 20),
    padding=st.integers(0, 10),
    side=st.booleans(),
    keep=keeps,
    protect=protects,
    seed=st.integers(),
)
@example(n=10, padding=7, side=True, keep=Fraction(7, 10), protect=Protect(), seed=0)
@example(n=3, padding=1, side=False, keep=Fraction(1, 3), protect=Protect(), seed=0)
def test_padding_changes_nothing(n: int, padding: int, side: bool, keep: Fraction, protect: Protect, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    scores = torch.rand(1, n, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 6, (1, n), generator=generator)
    pads = (padding, 0) if side else (0, padding)
    padded = [
        torch.nn.functional.pad(t, pads, value=v) for t, v in ((scores, 9.0), (torch.ones_like(ids), 0), (ids, 5))
    ]
    alone = spread(choose(scores, torch.ones_like(ids), ids, keep, protect), n)
    beside = spread(choose(padded[0], padded[1], padded[2], keep, protect), n + padding)
    assert torch.equal(beside[:, pads[0] : pads[0] + n], alone)
    assert int(beside.sum()) == int(alone.sum())


@pytest.mark.parametrize("keep", ["1/3", "7/10", 0.7, 0.1, "2/3", "1/7"])
def test_exact_shares_give_exact_counts(keep: Any) -> None:
    exact = Fraction(str(keep))
    for n in [*range(1, 70), 210, 420, 512]:
        ids = torch.zeros(1, n, dtype=torch.int64)
        chosen = choose(torch.rand(1, n), torch.ones(1, n, dtype=torch.int64), ids, keep, Protect())
        assert chosen.index.shape[1] == -(-n * exact.numerator // exact.denominator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_protection_beats_any_score(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    scores = torch.full((1, 6), limits.max, dtype=dtype)
    scores[0, 0], scores[0, 4] = limits.min, float("-inf")
    ids = torch.tensor([[1, 2, 3, 4, 7, 5]])
    chosen = choose(scores, torch.tensor([[1, 1, 1, 1, 1, 0]]), ids, "2/5", Protect(first=1, token_ids=(7,)))
    assert torch.equal(spread(chosen, 6), torch.tensor([[True, False, False, False, True, False]]))


def test_ranks_count_live_tokens() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    row = live_tokens(mask, mask, None, Protect(last=2))
    assert row.alive is not None
    assert row.count is not None
    assert row.padding is not None
    assert row.rank[row.alive].tolist() == [0, 1, 2, 0, 1, 2]
    assert row.count.tolist() == [[3], [3]]
    assert [int(mask[b, row.padding[b, 0]]) for b in range(2)] == [0, 0]
    assert row.end.tolist() == [[1], [1]]


@pytest.mark.parametrize(("name", "divisions"), [("bert", 1), ("llama", 4)])
def test_counts_take_one_division_where_a_table_of_positions_bounds_the_length(name: str, divisions: int) -> None:
    """In float32 a product of 9,973 and a length is exact up to 1,682 tokens."""
    plan = PrunePlan((Stage(1, "9973/9999"),), "norm")
    nodes = harness.pruned(harness.captured(name), plan).graph_module.graph.nodes
    for target in (torch.ops.aten.floor_divide.default, operator.floordiv):
        assert sum(n.target is target for n in nodes) == divisions, target
