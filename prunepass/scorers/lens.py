"""Where a token would be at the end of the model, told from the state that it leaves with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunepass.errors import WeightsError

__all__ = ["PREFIX", "Lens", "Moments", "check_lens"]

#: of a lens's weights among those of its stage
PREFIX = "lens."
_NAMES = ["down.weight", "up.bias", "up.weight"]
_RIDGE = 1e-3  # of the mean variance: enough for features that never vary


class Lens(nn.Module):
    """``h -> up(down(h))``, an affine map of low rank: an estimate of the last hidden state from that at a cut.

    The tuned lens (arXiv:2303.08112) reads a token's early states as if they were late ones, through one affine map a
    layer. Here it stands in for the blocks that a pruned token does not see, so that an output with a sequence axis
    has something better in its place than a state of another depth. The rank is low because it runs on every token
    that reaches its stage: ``4 * D * R`` FLOPs each.

    Weights, by name: ``down.weight`` [R, D], ``up.weight`` [D, R], ``up.bias`` [D].
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    @property
    def rank(self) -> int:
        """R."""
        return self.down.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] from [..., D]."""
        estimate: Tensor = self.up(self.down(hidden))
        return estimate

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], width: int, where: str) -> Lens:
        """From a plan's weights, in float32.

        Args:
            weights: by the names above.
            where: the stage, for messages.

        Raises:
            WeightsError: weights that are missing, left over, or of another width.
        """
        if not weights:
            raise WeightsError(
                f"restore='lens' needs trained weights {_NAMES} {where}, but the plan carries none. Give the plan as "
                "the folder that training or search wrote, or restore 'last' or 'zeros', which need none."
            )
        check_lens(weights, where)
        down = weights["down.weight"]
        if down.shape[1] != width:
            raise WeightsError(
                f"The lens {where} was trained for hidden states of width {down.shape[1]}, but this model's are "
                f"{width} wide. Take a plan trained for this model."
            )
        lens = cls(width, down.shape[0])
        lens.load_state_dict({k: v.to(torch.float32) for k, v in weights.items()})
        return lens


def check_lens(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise `WeightsError` where these are not the weights of one lens, whatever the width of its model."""
    if sorted(weights) != _NAMES:
        raise WeightsError(f"The lens {where} needs trained weights {_NAMES}, but has {sorted(weights)}.")
    down, up, bias = (weights[name] for name in ("down.weight", "up.weight", "up.bias"))
    if not all(value.is_floating_point() for value in weights.values()):
        raise WeightsError(f"The lens {where} is damaged: its weights are not of a floating type.")
    if down.dim() != 2 or up.shape != down.shape[::-1] or bias.shape != up.shape[:1]:
        raise WeightsError(
            f"The lens {where} is damaged: down.weight {tuple(down.shape)}, up.weight {tuple(up.shape)} and up.bias "
            f"{tuple(bias.shape)} do not fit together."
        )


class Moments:
    """Sums over tokens from which the best lens is computed: reduced-rank ridge regression, in closed form.

    Args:
        width: D.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self._early, self._late = zeros(width), zeros(width)
        self._within, self._across = zeros(width, width), zeros(width, width)

    @torch.no_grad()
    def add(self, early: Tensor, late: Tensor) -> None:
        """More tokens: their states [N, D] at the cut, and at the end."""
        early, late = early.double(), late.double()
        self.count += len(early)
        self._early += early.sum(0)
        self._late += late.sum(0)
        self._within += early.T @ early
        self._across += early.T @ late

    @torch.no_grad()
    def lens(self, rank: int) -> Lens:
        """The lens of this rank (at most D) with the least squared error on the tokens seen.

        The full solution W is projected on the leading right singular vectors of the fitted values (Izenman 1975).
        """
        width = len(self._early)
        rank = min(rank, width)
        means = self._early / self.count, self._late / self.count
        within = self._within - self.count * torch.outer(means[0], means[0])
        across = self._across - self.count * torch.outer(means[0], means[1])
        within.diagonal().add_(_RIDGE * within.diagonal().mean() + 1e-12)
        full = torch.linalg.solve(within, across)  # [D, D]: late = early @ full
        fitted = torch.linalg.cholesky(within).T @ full
        leading = torch.linalg.svd(fitted).Vh[:rank].T  # [D, R]
        lens = Lens(width, rank)
        lens.down.weight.copy_((full @ leading).T)
        lens.up.weight.copy_(leading)
        lens.up.bias.copy_(means[1] - means[0] @ full @ leading @ leading.T)
        return lens
