"""In-place operators are written as what they compute where all that shows the change is known; all others stay."""

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


def through_slices(x: Tensor, mask: Tensor) -> Tensor:
    """What stands to the left of an assignment, and what is read of it before and after."""
    scores = x * 2
    before = scores[:, :, 1:]
    scores[:, 0] = x[:, 1]
    scores[..., 2:4] *= 3
    scores[:, 1, :2].add_(before[:, 0, :2])
    return before + scores[..., :-1]


def through_other_axes(x: Tensor, mask: Tensor) -> Tensor:
    scores = x * 2
    turned = scores.transpose(1, 2)
    turned[:, 1:3] = 7
    scores.permute(2, 0, 1).unsqueeze(0)[0, 4].neg_()
    scores.view(2, 15)[:, ::4] = 0
    return scores + turned.transpose(1, 2)


def of_another_dtype(x: Tensor, mask: Tensor) -> Tensor:
    counts = x.new_zeros(x.shape)
    counts[:, 1] = mask
    counts[mask[:, None].expand_as(counts)] = 4
    return counts.to(torch.int64).add_(1)


def through_what_may_be_a_copy(x: Tensor, mask: Tensor) -> Tensor:
    scores = x * 2
    scores.transpose(1, 2).reshape(2, 15).add_(1)
    same = scores.reshape(2, 15)
    scores.mul_(2)
    return same + 1


def through_a_cast_to_its_own_dtype(x: Tensor, mask: Tensor) -> Tensor:
    """Which gives the same tensor, as Gemma 3n has it between its layers."""
    scores = (x * 2).type_as(x)
    scores[1:] += x[:1]
    same = scores.to(x.dtype)
    scores.mul_(2)
    return same + scores.to(torch.float64)


def of_an_input(x: Tensor, mask: Tensor) -> Tensor:
    x[:, 0] = 1
    return x * 2


@pytest.mark.parametrize(
    ("step", "count"),
    [
        (shaped_like_it, 1),
        (through_a_view, 1),
        (through_its_own_shape, 1),
        (through_slices, 4),
        (through_other_axes, 3),
        (of_another_dtype, 3),
        (through_what_may_be_a_copy, 0),
        (through_a_cast_to_its_own_dtype, 3),
        (of_an_input, 0),
    ],
)
def test_what_is_changed_in_place_is_computed(step: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
    given = (torch.randn(2, 3, 5), torch.tensor([[True, False, True, False, False]] * 2))
    gm = torch.export.export(Step(step), given).module(check_guards=False)
    assert make_functional(gm) == count
    gm.graph.lint()
    expected, got = (f(*(v.clone() for v in given)) for f in (step, gm))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
