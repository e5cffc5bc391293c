"""Ranking losses and metrics against plain loops, and what must not change them: padding, order, scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prunepass.errors import OptionError
from prunepass.training.methods import ranking

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = tuple[list[float], list[float]]  # scores and targets of a row's valid tokens

LOSSES: dict[str, Loss] = {
    "arp2": ranking.lambda_arp2,
    "arp2_top3": lambda *rows: ranking.lambda_arp2(*rows, top_k=3),
    "ndcg2": ranking.lambda_ndcg2,
    "ndcg2_top3": lambda *rows: ranking.lambda_ndcg2(*rows, top_k=3),
    "logistic": ranking.pairwise_logistic,
    "mse": ranking.standardised_mse,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

values = st.floats(-4, 4).map(lambda x: round(x, 2))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, targets (with ties) and valid of a few rows; a row may have no valid token."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    size = {"min_size": batch * length, "max_size": batch * length}
    scores = torch.tensor(draw(st.lists(values, **size)), dtype=torch.float64)
    targets = torch.tensor(draw(st.lists(st.integers(0, 6), **size)), dtype=torch.float64)
    valid = torch.tensor(draw(st.lists(st.sampled_from([True, True, False]), **size)))
    return tuple(x.view(batch, length) for x in (scores, targets, valid))


def rows_of(scores: Tensor, targets: Tensor, valid: Tensor) -> list[Row]:
    return [(s[v].tolist(), t[v].tolist()) for s, t, v in zip(scores, targets, valid, strict=True)]


def mean(numbers: list[float | None]) -> float:
    counted = [x for x in numbers if x is not None]
    return sum(counted) / len(counted) if counted else 0.0


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# -- the definitions, by loops -------------------------------------------------------------------------------------


def best_first(row: Row, top: int | None) -> list[tuple[float, float, int]]:
    """(score, target, relevance) of the teacher's best tokens."""
    chosen = sorted(zip(*row, strict=True), key=lambda pair: -pair[1])[:top]
    return [(s, t, len(chosen) - 1 - i) for i, (s, t) in enumerate(chosen)]


def arp2(row: Row, top: int | None) -> float | None:
    ranked = best_first(row, top)
    total = weights = 0.0
    for s, t, y in ranked:
        for s_other, t_other, y_other in ranked:
            if t > t_other:
                weights += y - y_other
                total += (y - y_other) * math.log2(1 + math.exp(-(s - s_other)))
    return total / weights if weights else None


def ndcg2(row: Row, top: int | None) -> float | None:
    ranked = best_first(row, top)
    ideal = sum((2**y - 1) / math.log2(2 + place) for place, (_, _, y) in enumerate(ranked))
    order = sorted(range(len(ranked)), key=lambda i: (-ranked[i][0], i))
    pairs = [(i, j) for i in range(len(ranked)) for j in range(len(ranked)) if ranked[i][1] > ranked[j][1]]
    total = 0.0
    for i, j in pairs:
        distance = abs(order.index(i) - order.index(j))
        delta = abs(1 / math.log2(1 + distance) - 1 / math.log2(2 + distance))
        gain = (2 ** ranked[i][2] - 2 ** ranked[j][2]) / ideal
        total += delta * gain * math.log2(1 + math.exp(-(ranked[i][0] - ranked[j][0])))
    return total if pairs else None


def logistic(row: Row) -> float | None:
    scores, targets = row
    terms = [
        softplus(-(scores[i] - scores[j]) * (1 if targets[i] > targets[j] else -1))
        for i in range(len(scores))
        for j in range(i)
        if targets[i] != targets[j]
    ]
    return sum(terms) / len(terms) if terms else None


def mse(row: Row) -> float | None:
    scores, targets = row
    if not scores:
        return None
    centre = sum(targets) / len(targets)
    deviation = math.sqrt(sum((t - centre) ** 2 for t in targets) / len(targets)) or 1.0
    return sum((s - (t - centre) / deviation) ** 2 for s, t in zip(scores, targets, strict=True)) / len(scores)


def tau_b(row: Row) -> float | None:
    scores, targets = row
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    ours = [(scores[i] > scores[j]) - (scores[i] < scores[j]) for i, j in pairs]
    theirs = [(targets[i] > targets[j]) - (targets[i] < targets[j]) for i, j in pairs]
    untied = math.sqrt(sum(map(abs, ours)) * sum(map(abs, theirs)))
    return sum(a * b for a, b in zip(ours, theirs, strict=True)) / untied if untied else None


ORACLES: dict[str, Callable[[Row], float | None]] = {
    "arp2": lambda row: arp2(row, None),
    "arp2_top3": lambda row: arp2(row, 3),
    "ndcg2": lambda row: ndcg2(row, None),
    "ndcg2_top3": lambda row: ndcg2(row, 3),
    "logistic": logistic,
    "mse": mse,
}


@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches())
def test_losses_are_those_of_their_definitions(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    expected = mean([ORACLES[name](row) for row in rows_of(*batch)])
    assert LOSSES[name](*batch).item() == pytest.approx(expected, abs=1e-12)


@given(batch=batches())
def test_tau_is_that_of_its_definition(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    found, rows = ranking.kendall_tau(*batch).item(), [tau_b(row) for row in rows_of(*batch)]
    if all(tau is None for tau in rows):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(mean(rows), abs=1e-6)


@given(batch=batches(), keep=st.fractions(Fraction(1, 20), 1, max_denominator=20))
def test_recall_counts_the_best_tokens_in_common(batch: tuple[Tensor, Tensor, Tensor], keep: Fraction) -> None:
    shares: list[float | None] = []
    for scores, targets in rows_of(*batch):
        wanted = math.ceil(keep * len(scores))
        best = [set(sorted(range(len(x)), key=lambda i: (-x[i], i))[:wanted]) for x in (scores, targets)]
        shares.append(len(best[0] & best[1]) / wanted if wanted else None)
    found = ranking.recall_at(*batch, keep).item()
    if all(share is None for share in shares):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(mean(shares), abs=1e-6)


# -- what must not matter ------------------------------------------------------------------------------------------


def example(batch: int = 4, length: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    valid = torch.rand(batch, length) > 0.3
    valid[0] = True
    return torch.randn(batch, length, dtype=dtype), torch.randn(batch, length, dtype=dtype), valid


@every_loss
@pytest.mark.parametrize("rubbish", [0.0, 1e4, math.inf, -math.inf, math.nan])
def test_padding_changes_neither_value_nor_gradient(loss: Loss, rubbish: float) -> None:
    scores, targets, valid = example()
    bare = scores.clone().requires_grad_()
    loss(bare, targets, valid).backward()
    wide = torch.full((len(scores), 5), rubbish, dtype=scores.dtype)
    padded = torch.cat([wide, torch.where(valid, scores, rubbish), wide], dim=1).requires_grad_()
    live = torch.nn.functional.pad(valid, (5, 5))
    value = loss(padded, torch.cat([wide, torch.where(valid, targets, rubbish), wide], dim=1), live)
    value.backward()
    torch.testing.assert_close(value, loss(scores, targets, valid))
    torch.testing.assert_close(padded.grad[:, 5:-5], bare.grad)
    assert not padded.grad[~live].any()


@every_loss
def test_order_and_copies_of_rows_change_nothing(loss: Loss) -> None:
    batch = example()
    expected = loss(*batch)
    torch.testing.assert_close(loss(*(x.flip(0) for x in batch)), expected)
    torch.testing.assert_close(loss(*(torch.cat([x, x]) for x in batch)), expected)


@every_loss
def test_order_of_tokens_changes_nothing(loss: Loss) -> None:
    batch = example()
    order = torch.randperm(batch[0].shape[1])
    torch.testing.assert_close(loss(*(x[:, order] for x in batch)), loss(*batch))


@every_loss
def test_gradients_are_those_of_the_value(loss: Loss) -> None:
    scores, targets, valid = example(2, 5)
    assert torch.autograd.gradcheck(lambda s: loss(s, targets, valid), scores.requires_grad_())
    assert torch.autograd.gradcheck(lambda s: loss(ranking.standardise(s, valid), targets, valid), scores)


@every_loss
def test_targets_get_no_gradient(loss: Loss) -> None:
    scores, targets, valid = example()
    loss(scores.requires_grad_(), targets.requires_grad_(), valid).backward()
    assert targets.grad is None


@every_loss
def test_half_precision_is_computed_in_float32(loss: Loss) -> None:
    scores, targets, valid = example(dtype=torch.bfloat16)
    value = loss(scores, targets, valid)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(scores.float(), targets.float(), valid))


@every_loss
def test_nothing_to_compare_costs_nothing(loss: Loss) -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    value = loss(scores, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("name", ["arp2", "ndcg2", "logistic"])
def test_only_the_order_of_targets_counts(name: str) -> None:
    scores, targets, valid = example()
    torch.testing.assert_close(LOSSES[name](scores, targets.exp() * 1e-9, valid), LOSSES[name](scores, targets, valid))


@pytest.mark.parametrize("length", [2, 30, 200])
def test_size_does_not_follow_the_length(length: int) -> None:
    equal, targets = torch.zeros(3, length), torch.rand(3, length)
    valid = torch.ones(3, length, dtype=torch.bool)
    assert ranking.lambda_arp2(equal, targets, valid).item() == pytest.approx(1, rel=1e-5)
    assert ranking.pairwise_logistic(equal, targets, valid).item() == pytest.approx(math.log(2), rel=1e-5)


def test_gains_of_long_rows_stay_finite() -> None:
    """2^1500 is beyond float64."""
    scores = torch.randn(1, 1500, requires_grad=True)
    value = ranking.lambda_ndcg2(scores, torch.rand(1, 1500), torch.ones(1, 1500, dtype=torch.bool))
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()


# -- sampled pairs -------------------------------------------------------------------------------------------------


def test_sampled_pairs_have_the_expectation_of_all_pairs() -> None:
    scores, targets, valid = example(3, 12)
    targets[0, :4] = 0.5  # ties are drawn, but not counted
    generator = torch.Generator().manual_seed(0)
    sampled = ranking.pairwise_logistic(scores, targets, valid, pairs=40_000, generator=generator)
    assert sampled.item() == pytest.approx(ranking.pairwise_logistic(scores, targets, valid).item(), rel=0.02)


def test_sampled_pairs_follow_the_generator() -> None:
    batch = example()
    draws = [
        ranking.pairwise_logistic(*batch, pairs=5, generator=torch.Generator().manual_seed(s)).item() for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_paired_with_itself(seed: int) -> None:
    """So a row of two has one pair to draw, and a row of one is left out."""
    scores = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    valid = torch.tensor([[True, True], [True, False]])
    generator = torch.Generator().manual_seed(seed)
    value = ranking.pairwise_logistic(scores, 1 - scores, valid, pairs=1, generator=generator)
    assert value.item() == pytest.approx(softplus(1))


# -- scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e20])
def test_standardised_rows_have_mean_0_and_deviation_1(scale: float) -> None:
    scores, _, valid = example(dtype=torch.float32)
    found = ranking.standardise(scores * scale + scale, valid)
    for row, live in zip(found, valid, strict=True):
        assert row[live].mean().item() == pytest.approx(0, abs=1e-5)
        assert row[live].std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert not row[~live].any()


def test_standardising_equal_scores_gives_zeros_and_no_gradient_but_zero() -> None:
    scores = torch.full((2, 4), 0.25, requires_grad=True)
    found = ranking.standardise(scores, torch.ones(2, 4, dtype=torch.bool))
    found.square().sum().backward()
    assert not found.any()
    assert not scores.grad.any()


def test_the_scale_of_saliencies_does_not_matter_to_the_mse() -> None:
    scores, targets, valid = example()
    expected = ranking.standardised_mse(scores, targets, valid)
    torch.testing.assert_close(ranking.standardised_mse(scores, targets * 1e-12, valid), expected)


def test_attention_scores_learn_a_ranking_faster_when_standardised() -> None:
    """Scores that sum to 1 over the row, as attention's do."""

    def learned(transform: Callable[[Tensor], Tensor]) -> float:
        torch.manual_seed(0)
        logits, targets = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
        optimiser = torch.optim.SGD([logits], lr=10)
        for _ in range(50):
            optimiser.zero_grad()
            ranking.lambda_arp2(transform(logits.softmax(1)), targets, valid).backward()
            optimiser.step()
        return ranking.kendall_tau(logits, targets, valid).item()

    valid = torch.ones(4, 64, dtype=torch.bool)
    raw, standardised = learned(lambda s: s), learned(lambda s: ranking.standardise(s, valid))
    assert raw < 0.2
    assert standardised > 0.4


# -- bad input -----------------------------------------------------------------------------------------------------


@every_loss
def test_shapes_that_do_not_fit_are_refused(loss: Loss) -> None:
    with pytest.raises(OptionError, match=r"\(2, 3\), \(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="bool"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


def test_options_out_of_range_are_refused() -> None:
    batch = example()
    with pytest.raises(OptionError, match="top_k"):
        ranking.lambda_arp2(*batch, top_k=1)
    with pytest.raises(OptionError, match="pairs"):
        ranking.pairwise_logistic(*batch, pairs=0)
    with pytest.raises(OptionError, match=r"\(0, 1\]"):
        ranking.recall_at(*batch, 0)
