"""Losses that teach scores to rank tokens as a teacher does, and how well they do.

All of them take scores [B, T] of the student, targets [B, T] (the teacher's importance, on any scale whose order is
meant) and valid [B, T] bool (live tokens that take part in the ranking). They compute in at least float32, have
gradients in the scores only, and average in each row before averaging over rows, so that neither the batch, the
padding nor the length of a text sets their size. Rows in which nothing can be compared do not count; where that is all
rows, a loss is 0 and a metric NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepass.errors import OptionError
from prunepass.plan import as_fraction
from prunepass.scorers.base import as_scores

__all__ = [
    "kendall_tau",
    "lambda_arp2",
    "lambda_ndcg2",
    "pairwise_logistic",
    "recall_at",
    "standardise",
    "standardised_mse",
]


def lambda_arp2(scores: Tensor, targets: Tensor, valid: Tensor, *, top_k: int | None = None) -> Tensor:
    """LambdaLoss for the average relevance position, as ToP's released code distils its ranking.

    ``sum over y_i > y_j of (y_i - y_j) log2(1 + exp(-(s_i - s_j)))`` (Wang et al., CIKM 2018, ARP-Loss2), where y is
    the rank from the bottom among the teacher's best ``top_k`` tokens (20 in ToP; None takes all) and the others are
    left out. Divided by the sum of its weights, K(K^2 - 1)/6, so that equal scores cost 1 at every K; ToP divides by
    K^2, which makes its loss about K/6 times this one. Memory: B * K^2 floats.

    Returns:
        Scalar, at least 0.
    """
    ranked = _by_teacher(scores, targets, valid, top_k)
    relevance = ranked.relevance
    weights = torch.where(ranked.pairs, relevance[:, :, None] - relevance[:, None, :], 0)
    losses = weights * F.softplus(-ranked.differences) / math.log(2)
    return _mean_of_rows(losses.sum(dim=(1, 2)), weights.sum(dim=(1, 2)))


def lambda_ndcg2(scores: Tensor, targets: Tensor, valid: Tensor, *, top_k: int | None = None) -> Tensor:
    """LambdaLoss for NDCG (Wang et al., CIKM 2018, NDCG-Loss2), ToP's alternative: pairs at the top weigh far more.

    ``sum over y_i > y_j of delta_ij |G_i - G_j| log2(1 + exp(-(s_i - s_j)))`` with relevance y as in `lambda_arp2`,
    ``G = (2^y - 1) / maxDCG``, ``delta_ij = |1/D_d - 1/D_(d+1)|``, ``D_d = log2(1 + d)`` and d the distance of the two
    tokens in the student's present ranking. (ToP calls a library that takes d + 1 for d.) A row's
    sum is not divided further: maxDCG bounds the weights at any length. As gains halve from rank to rank, hardly more
    than the best ten tokens count.

    Returns:
        Scalar, at least 0.
    """
    ranked = _by_teacher(scores, targets, valid, top_k)
    gains = _gains(ranked.relevance, ranked.live)
    place = _places(torch.where(ranked.live, ranked.scores.detach(), -torch.inf))
    distance = (place[:, :, None] - place[:, None, :]).abs().to(gains.dtype)
    delta = 1 / torch.log2(1 + distance.clamp(min=1)) - 1 / torch.log2(2 + distance)
    weights = torch.where(ranked.pairs, delta * (gains[:, :, None] - gains[:, None, :]), 0)
    losses = weights * F.softplus(-ranked.differences) / math.log(2)
    return _mean_of_rows(losses.sum(dim=(1, 2)), ranked.pairs.any(dim=2).any(dim=1))


def pairwise_logistic(
    scores: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SDTP's ranking loss (arXiv 2504.04514, L_r): ``log(1 + exp(-(s_i - s_j) sign(t_i - t_j)))`` over pairs i < j.

    The paper sums over all pairs, which grows with the square of the length; here it is their mean. Pairs with equal
    targets say nothing and are left out. Equal scores cost ln 2.

    Args:
        pairs: number of pairs to draw from each row, uniformly and with replacement: memory B * pairs instead of
            B * T^2, with the same expectation. None takes all.
        generator: draws the pairs; None takes torch's own.

    Returns:
        Scalar, at least 0.
    """
    if pairs is not None and pairs < 1:
        raise OptionError(f"pairs is the number of pairs drawn from each row and must be at least 1, not {pairs}.")
    ranked = _by_teacher(scores, targets, valid, None)
    if pairs is None:
        losses, counted = F.softplus(-ranked.differences), ranked.pairs
        return _mean_of_rows(torch.where(counted, losses, 0).sum(dim=(1, 2)), counted.sum(dim=(1, 2)))
    better, worse = _draw_pairs(ranked.live.sum(dim=1, keepdim=True), pairs, generator)
    counted = ranked.targets.gather(1, better) > ranked.targets.gather(1, worse)
    losses = F.softplus(ranked.scores.gather(1, worse) - ranked.scores.gather(1, better))
    return _mean_of_rows(torch.where(counted, losses, 0).sum(dim=1), counted.sum(dim=1))


def standardised_mse(scores: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """SDTP's L_mse with targets brought to mean 0 and standard deviation 1 in each row.

    Saliencies made of gradients have a tiny and varying scale, at which a mean squared error is next to nothing. Scores
    enter as they are, so a predictor learns that common scale. Where all targets of a row are equal they count as 0.

    Returns:
        Scalar, at least 0.
    """
    _check(scores, targets, valid)
    wanted = standardise(targets.detach(), valid)
    values = torch.where(valid, as_scores(scores), 0)
    return _mean_of_rows((values - wanted).square().sum(dim=1), valid.sum(dim=1))


def standardise(scores: Tensor, valid: Tensor) -> Tensor:
    """Each row at mean 0 and standard deviation 1, and 0 where not valid: [B, T], at least float32, differentiable.

    For scores that attention gives, which lie around 1/n: differences that small leave a ranking loss at its steepest,
    but hardly reach the weights. In a toy attention (rows of 128 tokens, 100 steps of Adam on `lambda_arp2`) Kendall's
    tau rose from 0.27 to 0.54 with raw scores, 0.80 with n times the scores, 0.84 with their logarithm and 0.87 with
    these; by plain gradient descent these alone came above 0.5 at every step size from 0.1 to 1000. Predictors learn a
    scale of their own and need none of it.
    """
    _check(scores, scores, valid)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    values = torch.where(valid, as_scores(scores), 0)
    centred = torch.where(valid, values - values.sum(dim=1, keepdim=True) / count, 0)
    # by the largest first: the squares of scores near 1e-25 would be 0 in float32
    largest = centred.detach().abs().amax(dim=1, keepdim=True)
    centred = centred / torch.where(largest > 0, largest, 1)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / torch.where(variance > 0, variance, 1).sqrt()


@torch.no_grad()
def kendall_tau(scores: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Kendall's tau-b of scores and targets, in [-1, 1], averaged over rows; a scalar for logs, without gradient.

    Rows in which all scores or all targets are equal have none and do not count.
    """
    _check(scores, targets, valid)
    ours, theirs = _signs(scores, valid), _signs(targets, valid)
    agreement = (ours * theirs).sum(dim=(1, 2)).float()
    untied = (ours != 0).sum(dim=(1, 2)).float().sqrt() * (theirs != 0).sum(dim=(1, 2)).float().sqrt()
    return (agreement / untied)[untied > 0].mean()


@torch.no_grad()
def recall_at(scores: Tensor, targets: Tensor, valid: Tensor, keep: Fraction | float) -> Tensor:
    """Share of the teacher's best k = ceil(keep n) tokens that are among the student's best k; a scalar, no gradient.

    Args:
        keep: share in (0, 1] of the row's n valid tokens. Ties go to the earlier token, as in a pruned model.
    """
    _check(scores, targets, valid)
    share = as_fraction(keep, "keep")
    if not 0 < share <= 1:
        raise OptionError(f"keep is the share of tokens that stays and must lie in (0, 1], not {keep!r}.")
    wanted = (valid.sum(dim=1, keepdim=True) * share.numerator + share.denominator - 1) // share.denominator
    ours = _places(torch.where(valid, as_scores(scores), -torch.inf)) < wanted
    theirs = _places(torch.where(valid, as_scores(targets), -torch.inf)) < wanted
    return ((ours & theirs).sum(dim=1) / wanted.squeeze(1))[wanted.squeeze(1) > 0].mean()


# -- rows in the teacher's order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranked:
    """The teacher's best K tokens of each row, best first; all [B, K]."""

    scores: Tensor  # the student's; 0 where not live
    targets: Tensor  # -inf where not live
    live: Tensor  # a prefix of each row

    @property
    def relevance(self) -> Tensor:
        """Rank from the bottom: n - 1 for the best of n live tokens, 0 for the last."""
        count = self.live.sum(dim=1, keepdim=True)
        place = torch.arange(self.live.shape[1], device=self.live.device)
        return (count - 1 - place).clamp(min=0).to(self.scores.dtype)

    @property
    def pairs(self) -> Tensor:
        """[B, K, K] bool: the teacher holds i for better than j."""
        return self.live[:, None, :] & (self.targets[:, :, None] > self.targets[:, None, :])

    @property
    def differences(self) -> Tensor:
        """[B, K, K] of the student's scores: s_i - s_j."""
        return self.scores[:, :, None] - self.scores[:, None, :]


def _by_teacher(scores: Tensor, targets: Tensor, valid: Tensor, top_k: int | None) -> _Ranked:
    _check(scores, targets, valid)
    if top_k is not None and top_k < 2:
        raise OptionError(f"top_k is the number of tokens that are compared and must be at least 2, not {top_k}.")
    masked = torch.where(valid, as_scores(targets.detach()), -torch.inf)
    order = masked.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    live = valid.gather(1, order)
    chosen = torch.where(live, as_scores(scores).gather(1, order), 0)
    return _Ranked(chosen, masked.gather(1, order), live)


def _gains(relevance: Tensor, live: Tensor) -> Tensor:
    """[B, K] (2^y - 1) / maxDCG of rows in the ideal order; by the largest 2^y, as 2^512 is beyond any float."""
    top = relevance.amax(dim=1, keepdim=True)
    gains = torch.where(live, torch.exp2(relevance - top) - torch.exp2(-top), 0)
    discounts = torch.log2(2 + torch.arange(live.shape[1], device=live.device, dtype=gains.dtype))
    ideal = (gains / discounts).sum(dim=1, keepdim=True)
    return gains / torch.where(ideal > 0, ideal, 1)


def _places(scores: Tensor) -> Tensor:
    """[B, T] int64: place of each token by descending score from 0; ties go to the earlier one."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _draw_pairs(count: Tensor, pairs: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Two [B, pairs] int64 of places i < j, uniform over the pairs of each row's first ``count`` [B, 1] places."""
    device = count.device if generator is None else generator.device
    uniform = torch.rand(2, len(count), pairs, generator=generator, device=device).to(count.device)
    last = (count - 1).clamp(min=0)
    first = torch.minimum((uniform[0] * count).long(), last)
    other = (uniform[1] * last).long()
    other = torch.minimum(other + (other >= first).long(), last)  # a row of one token gives (0, 0), which is no pair
    return torch.minimum(first, other), torch.maximum(first, other)


def _signs(values: Tensor, valid: Tensor) -> Tensor:
    """[B, T, T] int8: whether i stands above (1) or below (-1) j; 0 where equal or not valid."""
    above = (values[:, :, None] > values[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    return above.to(torch.int8) - above.transpose(1, 2).to(torch.int8)


def _mean_of_rows(totals: Tensor, weights: Tensor) -> Tensor:
    """Mean of ``totals / weights`` [B] over the rows of positive weight; 0 where there is none."""
    counted = weights > 0
    means = torch.where(counted, totals / torch.where(counted, weights, 1), 0)
    return means.sum() / counted.sum().clamp(min=1)


def _check(scores: Tensor, targets: Tensor, valid: Tensor) -> None:
    if scores.dim() == 2 and scores.shape == targets.shape == valid.shape and valid.dtype == torch.bool:
        return
    raise OptionError(
        f"A ranking loss takes scores, targets and valid (bool) of one shape [rows, tokens], but got "
        f"{tuple(scores.shape)}, {tuple(targets.shape)} and {tuple(valid.shape)} ({valid.dtype})."
    )
