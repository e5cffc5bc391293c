"""Masks in their smallest form: what is always true goes, all else stays, and values are the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

import harness
import zoo
from prunepass import PrunePlan, Stage
from prunepass.graph.capture import ensure_aten
from prunepass.graph.inputs import fake_value
from prunepass.graph.masks import simplify_masks
from prunepass.graph.ops import SDPA
from prunepass.pipeline import prune_graph

TOLERANCE = 1e-10
SIZES = ((1, 1), (3, 5), (2, 40))


class Attends(nn.Module):
    """Attention with a mask that is made of a padding mask and of ``part(places)``."""

    def __init__(self, part: Callable[[Tensor], Tensor], both: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.both = part, both

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[2])[None, None, :, None]
        seen = self.both(self.part(places), mask[:, None, None, :])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen.expand(-1, 1, x.shape[2], x.shape[2]))


def inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(tokens)
    mask = torch.rand(rows, tokens, generator=made) < 0.5
    mask[:, 0] = True
    return torch.randn(rows, 2, tokens, 8, generator=made), mask


def exported(module: nn.Module) -> Any:
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    shapes = ({0: batch, 2: length}, {0: batch, 1: length})
    program = torch.export.export(module, inputs(2, 9), dynamic_shapes=shapes)
    return program.module(check_guards=False)


def queries_of_masks(gm: GraphModule) -> list[Any]:
    """How many rows for queries the mask of each attention has."""
    given: list[Any] = [node.args[3] for node in gm.graph.find_nodes(op="call_function", target=SDPA)]
    return [fake_value(mask).shape[-2] for mask in given]


ALWAYS = {
    "places from 0": lambda places: places >= 0,
    "places from 3": lambda places: places + 3 >= 0,
    "ones": lambda places: torch.ones_like(places, dtype=torch.bool),
    "full": lambda places: torch.full((1, 1, places.shape[2], 1), True),
    "new ones": lambda places: places.new_ones((), dtype=torch.bool) & (places >= 0),
    "cast": lambda places: (places >= 0).to(torch.bool, copy=True),
}
NOT_ALWAYS = {
    "but the first": lambda places: places >= 1,
    "shifted down": lambda places: places - 1 >= 0,
    "added down": lambda places: places + -1 >= 0,
    "backwards": lambda places: -places >= 0,
    "from below": lambda places: torch.arange(-1, places.shape[2] - 1)[None, None, :, None] >= 0,
    "subtracted": lambda places: torch.add(places, 3, alpha=-1) >= 0,
    "zeros": lambda places: torch.zeros_like(places, dtype=torch.bool),
    "full of false": lambda places: torch.full((1, 1, places.shape[2], 1), False),
}


@pytest.mark.parametrize("both", [operator.and_, torch.logical_and])
@pytest.mark.parametrize("part", ALWAYS.values(), ids=ALWAYS)
def test_what_is_always_true_goes(part: Callable[[Tensor], Tensor], both: Callable[[Tensor, Tensor], Tensor]) -> None:
    module = Attends(part, both)
    gm = exported(module)
    assert simplify_masks(gm.graph)
    gm.recompile()
    assert queries_of_masks(gm) == [1], "a mask by keys has one row for all queries"
    for size in SIZES:
        torch.testing.assert_close(gm(*inputs(*size)), module(*inputs(*size)))


@pytest.mark.parametrize("part", NOT_ALWAYS.values(), ids=NOT_ALWAYS)
def test_all_else_stays(part: Callable[[Tensor], Tensor]) -> None:
    module = Attends(part, operator.and_)
    gm = exported(module)
    simplify_masks(gm.graph)
    gm.recompile()
    assert queries_of_masks(gm) != [1]
    for size in SIZES:
        torch.testing.assert_close(gm(*inputs(*size)), module(*inputs(*size)))


class Writes(nn.Module):
    """A mask that is written into after it was made; the second is an input."""

    def __init__(self, into_ones: bool) -> None:
        super().__init__()
        self.into_ones = into_ones

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        every = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)
        if self.into_ones:
            every[:, :1] = False
            every[:1] = True
            seen = every[None, None] & mask[:, None, None, :]
        else:
            seen = every[None, None] & mask[:, None, None, :]
            seen[..., :1] = False
            seen[..., -1:] = True
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)


@pytest.mark.parametrize("into_ones", [True, False])
def test_writes_into_a_mask_are_seen_and_stay_in_it(into_ones: bool) -> None:
    module = Writes(into_ones)
    gm = exported(module)
    simplify_masks(gm.graph)
    gm.recompile()
    for size in SIZES:
        (x, mask), (_, given) = inputs(*size), inputs(*size)
        torch.testing.assert_close(gm(x, mask), module(*inputs(*size)), equal_nan=True)
        assert torch.equal(mask, given), "the caller's mask is its own"


class Folds(nn.Module):
    """A mask that is folded, as only one in one piece can be."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, _, length, _ = x.shape
        every = (torch.arange(length) >= 0)[None, None, :, None]
        seen = (every & mask[:, None, None, :]).view(batch, length * length).view(batch, 1, length, length)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)


def test_a_mask_can_be_folded_as_before() -> None:
    gm = exported(Folds())
    assert simplify_masks(gm.graph)
    gm.recompile()
    for size in SIZES:
        torch.testing.assert_close(gm(*inputs(*size)), Folds()(*inputs(*size)))


def test_or_is_no_and() -> None:
    module = Attends(lambda places: places >= 0, operator.or_)
    gm = exported(module)
    simplify_masks(gm.graph)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs(2, 5)), module(*inputs(2, 5)))


def test_an_encoder_has_masks_of_keys_alone_also_after_pruning() -> None:
    gm = ensure_aten(harness.captured("bert").graph_module)
    x = zoo.batch([12, 7], seed=1)
    before = harness.run(gm, x)
    assert simplify_masks(gm.graph)
    gm.recompile()
    assert set(queries_of_masks(gm)) == {1}
    assert harness.difference(before, harness.run(gm, x), x["attention_mask"].bool()) < TOLERANCE
    plan = PrunePlan([Stage(1, "0.6"), Stage(2, "0.4")], "norm")
    pruned = prune_graph(harness.captured("bert").graph_module, plan)
    assert set(queries_of_masks(pruned.graph_module)) == {1}
    assert pruned.changes["masks"]


def test_a_decoder_keeps_its_triangle() -> None:
    gm = ensure_aten(harness.captured("llama").graph_module)
    x = zoo.batch([12, 7], seed=1)
    before = harness.run(gm, x)
    simplify_masks(gm.graph)
    gm.recompile()
    assert 1 not in queries_of_masks(gm)
    assert harness.difference(before, harness.run(gm, x), x["attention_mask"].bool()) < TOLERANCE
