"""Hard-concrete gates that learn where tokens leave and how many (CoFi, ACL 2022; ToP, KDD 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.plan import MAX_DENOMINATOR, as_fraction

__all__ = ["HardConcrete", "PruneGates", "Sample"]

EDGE = 1e-6  # keeps uniform numbers and probabilities away from 0 and 1
MAX_LOG_ALPHA = math.log(100)  # beyond it a gate would never be drawn the other way, and so never learn


class HardConcrete(nn.Module):
    """Random gates z in [0, 1] that are exactly 0 or 1 with positive probability (Louizos et al., ICLR 2018).

    ``z = clip((r - l) sigmoid((ln u - ln(1 - u) + a) / beta) + l, 0, 1)`` with u uniform in (0, 1), the stretch (l, r)
    and one trained log alpha ``a`` a gate.

    Args:
        shape: how many gates, or the shape of the tensor of gates.
        init: log alpha at the start; clamped as by `clamp_`.
        beta: temperature; the lower, the fewer gates lie strictly between 0 and 1.
        stretch: interval (l, r) around [0, 1] that the sigmoid is stretched to before clipping.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        init: float,
        beta: float = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
    ) -> None:
        super().__init__()
        if not (beta > 0 and stretch[0] < 0 and stretch[1] > 1):
            raise OptionError(f"Gates need beta > 0 and a stretch around [0, 1], not beta={beta}, stretch={stretch}.")
        self.beta, self.stretch = beta, stretch
        self.log_alpha = nn.Parameter(torch.full((shape,) if isinstance(shape, int) else shape, float(init)))
        self.clamp_()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw of each gate, float in [0, 1], differentiable in log alpha where strictly between.

        Args:
            generator: draws the numbers; give processes that train one model generators of the same seed.
        """
        low, high = self.stretch
        device = self.log_alpha.device if generator is None else generator.device
        uniform = torch.rand(self.log_alpha.shape, generator=generator, device=device).to(self.log_alpha)
        noise = torch.logit(uniform, eps=EDGE)
        return (torch.sigmoid((noise + self.log_alpha) / self.beta) * (high - low) + low).clamp(0, 1)

    def probability(self) -> Tensor:
        """``P(z > 0) = sigmoid(a - beta ln(-l / r))`` of each gate, differentiable, within [1e-6, 1 - 1e-6]."""
        low, high = self.stretch
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-low / high)).clamp(EDGE, 1 - EDGE)

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """The gates read off: 1 at as many as are expected open along the last axis, the most probable ones, else 0."""
        probability = self.probability()
        closed = (1 - probability).sum(dim=-1, keepdim=True).round()
        place = self.log_alpha.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (place < probability.shape[-1] - closed).to(self.log_alpha.dtype)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Hold log alpha within +-ln 100; to be called after each step of the optimiser."""
        self.log_alpha.clamp_(-MAX_LOG_ALPHA, MAX_LOG_ALPHA)


@dataclass(frozen=True)
class Sample:
    """One draw of all gates, shared by the rows of a batch.

    Attributes:
        gate: [sites] 1 where a stage is there, 0 where not; with the gradient of the gate behind it.
        bins: [sites, bins] in [0, 1], never rising along a site: how much of each percentile of the ranking stays,
            the best first.
    """

    gate: Tensor
    bins: Tensor

    def mask(self, site: int, rank: Tensor, count: Tensor) -> Tensor:
        """How much of each token a site lets through: ``1 - (1 - m) g`` (ToP), in [0, 1], differentiable.

        m is the mean of the site's bins over the token's own part of the ranking, from rank/n to (rank + 1)/n, so that
        the mean over a row is the mean of the bins, whatever n is. One bin a token, as released, makes rows of fewer
        tokens than bins meet only some of them, and keep another share than the constraint counts with.

        Args:
            rank: [B, S] int64, place by descending score among the tokens that are ranked, from 0.
            count: [B, 1] int64, n, the number of ranked tokens in each row. Tokens with ``rank >= n`` get 0.
        """
        size = self.bins.shape[1]
        bins = F.pad(self.bins[site], (0, 1))
        better = F.pad(self.bins[site].cumsum(0), (1, 0))  # better[b]: sum over the bins before b
        n = count.clamp(min=1)
        # both ends of the token's part, counted in n-ths of a bin: whole numbers, so long rows lose no precision
        start, end = torch.minimum(rank, count) * size, torch.minimum(rank + 1, count) * size
        first, last = start // n, end // n
        fractions = (bins[last] * (end - last * n) - bins[first] * (start - first * n)) / n
        share = ((better[last] - better[first] + fractions) * n / size).clamp(0, 1)
        return torch.where(rank < count, 1 - (1 - share) * self.gate[site], 0)


class PruneGates(nn.Module):
    """Where tokens leave, and how many: a coarse gate a site and a fine gate for each percentile of the ranking.

    A site is a place where a stage may stand. The coarse gate says whether there is one, by a hard 0 or 1 with the
    gradient of the soft gate (straight-through). The fine gates say how much of each percentile of the ranking stays;
    ranking starts anew among the tokens that reach the site. Both are drawn once a step for the whole batch.

    The fine gates form a prefix: the draws of a site are sorted, so that no token stays where a better ranked one goes,
    and the share kept remains as drawn. In ToP's released code each percentile keeps its own draw, and the masks it
    learned do have holes, which no choice of the k best tokens reproduces.

    Call `clamp_` after each step of the optimiser, and leave the parameters out of weight decay.

    Args:
        sites: number of sites, in the order in which tokens meet them.
        bins: percentiles of the ranking at each site (ToP: 20 to 100).
        gate_init, bin_init: log alpha at the start. The defaults, ToP's, mean after clamping that a site is on with
            probability 0.05 and a bin open with 0.998.
    """

    def __init__(self, sites: int, bins: int = 50, *, gate_init: float = -10.0, bin_init: float = 10.0) -> None:
        super().__init__()
        if sites < 1 or bins < 2:
            raise OptionError(f"Gates need at least 1 site and 2 bins, not sites={sites}, bins={bins}.")
        self.coarse = HardConcrete((sites, 1), init=gate_init)
        self.fine = HardConcrete((sites, bins), init=bin_init)

    def forward(self, generator: torch.Generator | None = None) -> Sample:
        """A new draw when training; in eval mode the gates as they are read off, 0 or 1.

        Args:
            generator: draws the numbers; processes that train one model need generators of the same seed.
        """
        if self.training:
            soft = self.coarse.sample(generator).squeeze(1)
            gate = soft + ((soft > 0).to(soft.dtype) - soft).detach()
            drawn = self.fine.sample(generator)
        else:
            gate, drawn = self.coarse.deterministic().squeeze(1), self.fine.deterministic()
        return Sample(gate, drawn.sort(dim=1, descending=True).values)

    def stage_probability(self) -> Tensor:
        """[sites] probability that there is a stage, differentiable."""
        return self.coarse.probability().squeeze(1)

    def expected_keep(self) -> Tensor:
        """[sites] expected share of the row's original tokens that is still there behind each site, differentiable.

        ``prod over k <= site of rho_k`` with ``rho = 1 - (1 - mean_b P(m_b > 0)) P(g > 0)`` (ToP).
        """
        left = self.fine.probability().mean(dim=1)
        return torch.cumprod(1 - (1 - left) * self.stage_probability(), dim=0)

    @torch.no_grad()
    def keeps(self) -> list[Fraction | None]:
        """The gates read off as a plan's keeps: shares of the original tokens that never rise; None where no stage is.

        A site is a stage if its gate is on with more than one half and it drops anything. It lets through
        ``1 - round(B - sum_b P(m_b > 0)) / B`` of what reaches it, at least one bin.
        """
        bins = self.fine.log_alpha.shape[1]
        counts = self.fine.deterministic().sum(dim=1).clamp(min=1).long().tolist()
        left, keeps = Fraction(1), list[Fraction | None]()
        for count, on in zip(counts, self.coarse.deterministic().squeeze(1).tolist(), strict=True):
            if not on or count == bins:
                keeps.append(None)
                continue
            left *= Fraction(count, bins)
            keeps.append(max(as_fraction(left, "keep"), Fraction(1, MAX_DENOMINATOR)))
        return keeps

    def clamp_(self) -> None:
        """`HardConcrete.clamp_` of all gates."""
        self.coarse.clamp_()
        self.fine.clamp_()
