"""Gates against their formulas: how often they open, what a draw lets through, what is read off."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prunepass import Protect, Stage
from prunepass.errors import OptionError
from prunepass.training.methods import gating
from prunepass.training.methods.gates import HardConcrete, PruneGates, Sample
from prunepass.training.methods.gating import TopGate

LOG_100 = math.log(100)


def gates_of(coarse: list[float], fine: list[list[float]]) -> PruneGates:
    """Gates with given probabilities to be on and open."""
    gates = PruneGates(len(coarse), len(fine[0])).double()
    offset = -2 / 3 * math.log(0.1 / 1.1)
    with torch.no_grad():
        gates.coarse.log_alpha.copy_(torch.logit(torch.tensor(coarse, dtype=torch.float64))[:, None] - offset)
        gates.fine.log_alpha.copy_(torch.logit(torch.tensor(fine, dtype=torch.float64)) - offset)
    return gates


def ranks(counts: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Rank by slot, the same in each row, and the rows' counts."""
    return torch.arange(width).expand(len(counts), width), torch.tensor(counts)[:, None]


# -- hard concrete -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-2.5, 0.0, 1.0])
def test_gates_open_as_often_as_the_formula_says(log_alpha: float) -> None:
    gates = HardConcrete(20_000, init=log_alpha)
    drawn = gates.sample(torch.Generator().manual_seed(0))
    assert (drawn > 0).double().mean().item() == pytest.approx(gates.probability()[0].item(), abs=0.015)
    # by symmetry of the stretch, a gate is fully open as often as one of the opposite log alpha is shut
    shut = 1 - HardConcrete(1, init=-log_alpha).probability().item()
    assert (drawn == 1).double().mean().item() == pytest.approx(shut, abs=0.015)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_a_draw_is_the_stretched_and_clipped_sigmoid() -> None:
    gates = HardConcrete(50, init=0.3, beta=0.5, stretch=(-0.2, 1.3)).double()
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(3)).double()
    expected = [
        min(1.0, max(0.0, 1.5 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / 0.5)) - 0.2))
        for u, a in zip(uniform.tolist(), gates.log_alpha.tolist(), strict=True)
    ]
    torch.testing.assert_close(gates.sample(torch.Generator().manual_seed(3)).tolist(), expected)


def test_draws_have_the_gradient_of_their_value() -> None:
    gates = HardConcrete(12, init=0.2).double()

    def draw(log_alpha: Tensor) -> Tensor:
        return torch.func.functional_call(_Draw(gates), {"gates.log_alpha": log_alpha}, ())

    assert torch.autograd.gradcheck(draw, gates.log_alpha.detach().clone().requires_grad_())


class _Draw(torch.nn.Module):
    def __init__(self, gates: HardConcrete) -> None:
        super().__init__()
        self.gates = gates

    def forward(self) -> Tensor:
        return self.gates.sample(torch.Generator().manual_seed(0))


def test_log_alpha_is_held_where_a_gate_can_still_learn() -> None:
    gates = HardConcrete((2, 3), init=1000)
    assert gates.log_alpha.flatten().tolist() == pytest.approx([LOG_100] * 6)
    with torch.no_grad():
        gates.log_alpha.sub_(1000)
    gates.clamp_()
    assert gates.log_alpha.flatten().tolist() == pytest.approx([-LOG_100] * 6)
    assert 0.04 < gates.probability().min().item() < 0.05


def test_as_many_gates_are_read_off_open_as_are_expected() -> None:
    gates = HardConcrete(4, init=0)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([-4.0, 3.0, -1.0, 1.0]))  # P: 0.08, 0.99, 0.65, 0.93: 2.65 expected
    assert gates.deterministic().tolist() == [0, 1, 1, 1]
    with torch.no_grad():
        gates.log_alpha[2] = -2.5  # 2.29 expected
    assert gates.deterministic().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"stretch": (0.0, 1.1)}, {"stretch": (-0.1, 1.0)}])
def test_gates_that_could_not_be_hard_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="stretch"):
        HardConcrete(3, init=0, **wrong)  # type: ignore[arg-type]


# -- draws of all sites --------------------------------------------------------------------------------------------


def test_no_token_stays_where_a_better_one_goes() -> None:
    gates = PruneGates(3, 20, bin_init=0.0)
    rank, count = ranks([30, 20, 7, 1], 30)
    for seed in range(20):
        sample = gates(torch.Generator().manual_seed(seed))
        for site in range(3):
            assert (sample.mask(site, rank, count).diff(dim=1) <= 1e-6).all()


def test_the_mean_draw_keeps_what_is_expected() -> None:
    gates = gates_of([0.5, 0.8], [[0.9] * 10 + [0.1] * 10, [0.7] * 5 + [0.3] * 15])
    drawn = [gates(torch.Generator().manual_seed(i)) for i in range(3000)]
    on, kept = torch.stack([s.gate for s in drawn]), torch.stack([(s.bins > 0).double().mean(1) for s in drawn])
    rho = (1 - (1 - kept) * on).mean(0)
    torch.testing.assert_close(rho.cumprod(0), gates.expected_keep(), atol=0.02, rtol=0)
    assert gates.expected_keep()[0].item() == pytest.approx(1 - 0.5 * 0.5)
    assert gates.expected_keep()[1].item() == pytest.approx((1 - 0.5 * 0.5) * (1 - 0.8 * 0.6))
    assert gates.stage_probability().tolist() == pytest.approx([0.5, 0.8])


def test_coarse_gates_are_hard_and_learn_through_the_soft_one() -> None:
    gates = PruneGates(200, 2, gate_init=-1.0)
    sample = gates(torch.Generator().manual_seed(0))
    assert set(sample.gate.tolist()) == {0.0, 1.0}
    sample.gate.sum().backward()
    learns = gates.coarse.log_alpha.grad.squeeze(1)
    assert (learns >= 0).all()
    assert 0.3 < (learns > 0).float().mean() < 0.9, "gates strictly between 0 and 1 have a gradient, the others none"


def test_a_draw_has_a_gradient_in_all_gates() -> None:
    gates = PruneGates(1, 8, gate_init=0.0, bin_init=0.0).double()
    rank, count = ranks([20], 20)
    importance = torch.linspace(2, 0, 20, dtype=torch.float64)
    for seed in range(30):
        sample = gates(torch.Generator().manual_seed(seed))
        (importance * (1 - sample.mask(0, rank, count))).sum().backward()
    assert (gates.fine.log_alpha.grad < 0).all(), "what is dropped is missed, so every bin should open"
    assert (gates.coarse.log_alpha.grad > 0).all(), "and the stage go"


def test_evaluation_is_what_is_read_off() -> None:
    gates = gates_of([0.9, 0.2], [[0.9, 0.8, 0.2, 0.1], [0.5] * 4]).eval()
    sample = gates()
    assert sample.gate.tolist() == [1, 0]
    assert sample.bins[0].tolist() == [1, 1, 0, 0]
    rank, count = ranks([8], 8)
    assert sample.mask(0, rank, count)[0].tolist() == [1] * 4 + [0] * 4
    assert sample.mask(1, rank, count)[0].tolist() == [1] * 8


# -- masks ---------------------------------------------------------------------------------------------------------


@given(
    bins=st.lists(st.floats(0, 1), min_size=2, max_size=30).map(lambda x: sorted(x, reverse=True)),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    extra=st.integers(0, 3),
)
def test_rows_of_any_length_keep_the_same_share(bins: list[float], counts: list[int], extra: int) -> None:
    """Also rows with fewer tokens than there are bins."""
    width = max(counts) + extra
    rank, count = ranks(counts, width)
    sample = Sample(torch.ones(1), torch.tensor([bins], dtype=torch.float64))
    mask = sample.mask(0, rank, count)
    for row, n in zip(mask, counts, strict=True):
        assert row.sum().item() / n == pytest.approx(sum(bins) / len(bins), abs=1e-9)
        assert not row[n:].any(), "what is not ranked is not kept"


@given(bins=st.lists(st.floats(0, 1), min_size=2, max_size=12), n=st.integers(1, 25))
def test_a_token_gets_the_mean_of_its_part_of_the_bins(bins: list[float], n: int) -> None:
    rank, count = ranks([n], n)
    mask = Sample(torch.ones(1), torch.tensor([bins], dtype=torch.float64)).mask(0, rank, count)[0]
    for r in range(n):
        start, end = Fraction(r, n), Fraction(r + 1, n)
        expected = 0.0
        for b, value in enumerate(bins):
            overlap = min(end, Fraction(b + 1, len(bins))) - max(start, Fraction(b, len(bins)))
            expected += value * float(max(Fraction(0), overlap) * n)
        assert mask[r].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [5, 100, 511, 4096])
def test_hard_bins_give_hard_masks_in_float32(n: int) -> None:
    bins = (torch.arange(50) < 20).float()[None]
    rank, count = ranks([n], n)
    mask = Sample(torch.ones(1), bins).mask(0, rank, count)[0]
    kept = int(Fraction(2, 5) * n)
    torch.testing.assert_close(mask[:kept], torch.ones(kept), atol=2e-6, rtol=0)
    assert not mask[kept + 1 :].any()


def test_a_stage_that_is_off_keeps_all_that_is_ranked() -> None:
    rank, count = ranks([3, 5], 5)
    mask = Sample(torch.zeros(1), torch.zeros(1, 4)).mask(0, rank, count)
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_masks_have_the_gradient_of_their_value() -> None:
    rank, count = ranks([3, 7], 7)
    bins = torch.rand(1, 5, dtype=torch.float64) * 0.8 + 0.1
    gate = torch.rand(1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda g, b: Sample(g, b).mask(0, rank, count), (gate.requires_grad_(), bins.requires_grad_())
    )


# -- reading off ---------------------------------------------------------------------------------------------------


def test_keeps_are_shares_of_the_original_tokens() -> None:
    gates = gates_of([0.9, 0.2, 0.7], [[0.98] * 6 + [0.02] * 4, [0.1] * 10, [0.5] * 10])
    assert gates.keeps() == [Fraction(3, 5), None, Fraction(3, 10)]


def test_untrained_gates_prune_nothing() -> None:
    assert PruneGates(4).keeps() == [None] * 4


def test_a_stage_that_drops_nothing_is_none() -> None:
    assert gates_of([0.9], [[0.98] * 10]).keeps() == [None]


def test_something_is_always_kept() -> None:
    sites = 4
    gates = PruneGates(sites, 20, gate_init=10, bin_init=-10)
    gates.fine.log_alpha.data.sub_(100)
    keeps = gates.keeps()
    assert keeps == [Fraction(1, 20), Fraction(1, 400), Fraction(1, 8000), Fraction(1, 10_000)]
    assert [Stage(i, keep).keep for i, keep in enumerate(keeps)] == keeps  # a plan takes them as they are


@given(st.lists(st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)), min_size=1, max_size=5))
def test_keeps_never_rise(sites: list[tuple[float, float]]) -> None:
    keeps = [k for k in gates_of([g for g, _ in sites], [[p] * 13 for _, p in sites]).keeps() if k is not None]
    assert keeps == sorted(keeps, reverse=True)
    assert all(0 < k < 1 for k in keeps)


@pytest.mark.parametrize(("sites", "bins"), [(0, 10), (3, 1)])
def test_too_few_sites_or_bins_are_refused(sites: int, bins: int) -> None:
    with pytest.raises(OptionError, match=f"sites={sites}, bins={bins}"):
        PruneGates(sites, bins)


def gradient_of_top(pull: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(pull.shape, generator=generator).requires_grad_()
    protected = torch.zeros(pull.shape, dtype=torch.int64)
    (TopGate(Stage(1, 0.5), Protect())(scores, None, None, protected, None) * pull).sum().backward()
    assert scores.grad is not None
    return scores.grad


def test_tokens_compete_for_their_places() -> None:
    """Where every token would do the same good none is moved; what one gains the others lose."""
    torch.testing.assert_close(gradient_of_top(torch.ones(2, 12)), torch.zeros(2, 12))
    pull = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    found = gradient_of_top(pull)
    torch.testing.assert_close(found.sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_of_top(pull + 3), found, atol=1e-5, rtol=1e-4)
    best, worst = pull.argmax(1), pull.argmin(1)
    assert (found.gather(1, best[:, None]) > found.gather(1, worst[:, None])).all()


def test_one_tokens_gradient_does_not_drown_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a dropped [SEP], which would draw most of the attention if a trace of it came back."""
    pull = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    pull[0, 5] = 1e6
    bounded = gradient_of_top(pull)
    monkeypatch.setattr(gating, "_OUTLIER", math.inf)
    free = gradient_of_top(pull)
    assert free[0].abs().max() > 1e4
    assert bounded[0, 5] > 0
    assert bounded[0].abs().max() < 20
    torch.testing.assert_close(bounded[1], free[1])
    assert free[1].abs().max() > 0
