"""Gates as the training graph calls them: scores in, how much of each token is there out (`passes.gate`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunepass.passes.live import in_order
from prunepass.passes.select import select_mask
from prunepass.plan import Protect, Stage

if TYPE_CHECKING:
    from prunepass.training.methods.gates import Sample

__all__ = ["Gate", "RankGate", "TopGate"]

_OUTLIER = 10.0  # times the median of its row that one token's gradient may be


class Gate(nn.Module):
    """Base: keeps what passed through it, for losses and logs.

    Attributes:
        scores: [B, S], as the predictor gave them, with their gradient.
        ranked: [B, S] bool, the tokens that stood to be chosen from (live and not dropped before).
        degree: [B, S] float32 in [0, 1], what was chosen.
    """

    scores: Tensor
    ranked: Tensor
    degree: Tensor

    def forward(
        self, scores: Tensor, before: Tensor | None, live: Tensor | None, protected: Tensor, count: Tensor | None
    ) -> Tensor:
        """[B, S] float32 degrees; never above ``before``, the degrees of the stage before.

        Args:
            scores: [B, S] floating.
            before: [B, S] float32; None at the first stage.
            live: [B, S] bool, False at padding; None where there is none.
            protected: [B, S] int64, as by `passes.live.live_tokens`.
            count: [B, 1] int64, original live tokens of each row; None where there is no padding.
        """
        ranked = before > 0 if before is not None else live if live is not None else torch.ones_like(protected).bool()
        degree = self.choose(scores.float(), ranked, protected, count)
        self.scores, self.ranked = scores, ranked
        self.degree = degree if before is None else degree * before
        return self.degree

    def choose(self, scores: Tensor, ranked: Tensor, protected: Tensor, count: Tensor | None) -> Tensor:
        """[B, S] degrees of the ranked tokens, 0 at all others."""
        raise NotImplementedError


class TopGate(Gate):
    """The deployed choice with a gradient: hard top-k forward, a sigmoid around the threshold backward.

    ``z = 1[s in top k] + g - stop(g)`` with ``g = sigmoid((s - t) / temperature)`` and t half-way between the last
    score kept and the first dropped. SDTP draws the choice by Gumbel-softmax over keep and drop logits (eq. 2); the
    difference of two Gumbel variables is logistic, which is added to the scores where ``noise`` is not 0. With scores
    of standard deviation one per row (the gate divides by it) the temperature means the same at each depth.
    """

    def __init__(self, stage: Stage, protect: Protect, temperature: float = 0.5, noise: float = 0.0) -> None:
        super().__init__()
        self.stage, self.protect = stage, protect
        self.temperature, self.noise = temperature, noise

    def choose(self, scores: Tensor, ranked: Tensor, protected: Tensor, count: Tensor | None) -> Tensor:
        """As `Gate.choose`; forward values are 0 and 1."""
        scores = scores / _spread(scores.detach(), ranked)
        if self.training and self.noise:
            uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            scores = scores + self.noise * torch.logit(uniform)
        kept = select_mask(
            scores.detach(),
            scores.shape[1],
            self.stage,
            self.protect,
            order=in_order(protected, ranked),
            alive=ranked,
            count=count,
        )
        kept = kept & ranked
        free = ranked & (protected == 0)
        lowest = torch.where(kept & free, scores, torch.inf).amin(dim=1, keepdim=True)
        highest = torch.where(~kept & free, scores, -torch.inf).amax(dim=1, keepdim=True)
        threshold = ((lowest + highest) / 2).detach()
        # rows where nothing is chosen between have no threshold and so no gradient
        decided = threshold.isfinite()
        threshold = _moving(torch.where(decided, threshold, 0), scores, free & decided, self.temperature)
        soft = torch.sigmoid((scores - threshold) / self.temperature)
        through = torch.where(free & decided, soft - soft.detach(), torch.zeros_like(soft))
        if through.requires_grad:
            through.register_hook(_bounded)
        return kept.float() + through


class RankGate(Gate):
    """ToP's gate: a token's place in the ranking decides, by masks that are learned per percentile of the ranking.

    Args:
        site: which of the shared gates this one is.

    Attributes:
        sample: the draw of all gates to use, set before each run.
    """

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site
        self.sample: Sample | None = None

    def choose(self, scores: Tensor, ranked: Tensor, protected: Tensor, count: Tensor | None) -> Tensor:
        """As `Gate.choose`. Protected tokens stand outside the ranking and stay, as [CLS] in ToP; in a deployed plan
        they count among the tokens kept, which with one of them is a difference of less than a token."""
        assert self.sample is not None, "no gates were drawn"
        free = ranked & (protected == 0)
        order = torch.where(free, scores.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
        slots = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, slots)
        chosen = self.sample.mask(self.site, rank, free.sum(dim=1, keepdim=True))
        return torch.where(free, chosen.float(), (ranked & (protected > 0)).float())


def _moving(threshold: Tensor, scores: Tensor, free: Tensor, temperature: float) -> Tensor:
    """The threshold [B, 1] with the gradient by which the sum of all sigmoids stays what it is.

    A token that comes in pushes another out. Were the threshold fixed, each token by itself would ask to come in, as
    more is always better, and what sets one apart from another would be lost in that.
    """
    with torch.no_grad():
        sigmoid = torch.sigmoid((scores - threshold) / temperature)
        slope = torch.where(free, sigmoid * (1 - sigmoid), 0)
        share = slope / slope.sum(1, keepdim=True).clamp(min=1e-12)
    return threshold + (share * (scores - scores.detach())).sum(1, keepdim=True)


def _bounded(gradient: Tensor) -> Tensor:
    """[B, S]: each row's gradient with no entry above some times their median.

    The gradient of a token that was dropped is that of letting in a trace of it, which grows without bound where the
    whole token would draw most of the attention, as [SEP] does: one such token would drown what all others say.
    """
    size = torch.where(gradient == 0, torch.nan, gradient.abs())
    bound = (_OUTLIER * size.nanquantile(0.5, dim=1, keepdim=True)).nan_to_num(0.0)
    # what is not finite has to stay so: a scaler of gradients looks for it
    return torch.where(gradient.isfinite(), gradient.clamp(-bound, bound), gradient)


def _spread(scores: Tensor, ranked: Tensor) -> Tensor:
    """[B, 1] standard deviation of the ranked scores."""
    count = ranked.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(ranked, scores, 0).sum(dim=1, keepdim=True) / count
    variance = torch.where(ranked, (scores - mean).square(), 0).sum(dim=1, keepdim=True) / count
    return variance.sqrt().clamp(min=1e-6)
