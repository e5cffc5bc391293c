"""In-place operators on values that nothing else sees are written as what they compute; all others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prunepass.graph.functional import make_functional


class Step(nn.Module):
    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.step(x, mask)


def shaped_like_it(x: Tensor, mask: Tensor) -> Tensor:
    """As XLM masks its scores: the mask's view asks for the scores' shape, and is no view of them."""
    scores = x * 2
    return scores.masked_fill_(mask[:, None].expand_as(scores), -1.0) + scores


def through_a_view(x: Tensor, mask: Tensor) -> Tensor:
    scores = x * 2
    first = scores[:, 0]
    scores.masked_fill_(mask[:, None], -1.0)
    return first + scores.sum(1)


def through_its_own_shape(x: Tensor, mask: Tensor) -> Tensor:
    scores = x * 2
    same = scores.expand_as(scores)
    scores.masked_fill_(mask[:, None], -1.0)
    return same + 1


@pytest.mark.parametrize(("step", "count"), [(shaped_like_it, 1), (through_a_view, 0), (through_its_own_shape, 0)])
def test_only_what_nothing_else_sees(step: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
    given = (torch.randn(2, 3, 5), torch.tensor([[True, False, True, False, False]] * 2))
    gm = torch.export.export(Step(step), given).module(check_guards=False)
    assert make_functional(gm) == count
    torch.testing.assert_close(gm(*given), step(*given))
