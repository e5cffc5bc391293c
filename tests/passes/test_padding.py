"""A row's result does not depend on how far it was padded, on which side, or on which rows stand beside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtimes import predictor
from torch import Tensor, nn

import harness
import oracle
import zoo
from prunepass import Protect, PrunePlan, Stage

TOLERANCE = 1e-10

# Plans are drawn from a pool, since each costs a rewriting; rows, sides and neighbours are drawn freely.
PLANS: tuple[PrunePlan, ...] = (
    PrunePlan((Stage(1, "1/3", after_attention=True), Stage(2, "1/5")), protect=Protect(first=0)),
    PrunePlan((Stage(0, 0.9, "norm"), Stage(2, 0.5, after_attention=True)), protect=Protect(first=3, last=2)),
    PrunePlan((Stage(1, 0.6), Stage(2, 0.2, "norm")), protect=Protect(first=1, last_share=0.2, token_ids=(11, 12, 13))),
    PrunePlan((Stage(2, 0.4), Stage(3, 0.1)), {"name": "random", "seed": 3}),
    PrunePlan(
        (Stage(1, 0.7), Stage(2, 0.3)),
        "mlp",
        Protect(first=1, last=2),
        weights=predictor(stages=2, width=zoo.HIDDEN, positions=True),
    ),
)

# Left padding moves the positions of a model that counts from the padded start, unless it is given position_ids.
SPECIES = ("bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "mistral", "bloom")


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def inputs_of(name: str, rows: list[Tensor], width: int, side: str) -> dict[str, Tensor]:
    x = zoo.pad_rows(rows, width=width, side=side)
    return zoo.with_positions(x) if zoo.SPECIES[name].positions == "input" else x


@cache
def module(name: str, plan: int) -> nn.Module:
    names = ("input_ids", "attention_mask")
    if zoo.SPECIES[name].positions == "input":
        names += ("position_ids",)
    return harness.pruned(harness.captured(name, inputs=names), PLANS[plan]).graph_module


def row(length: int, seed: int) -> Tensor:
    return torch.randint(5, zoo.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def states(name: str, model: nn.Module, rows: list[Tensor], width: int, side: str) -> list[Tensor]:
    """The hidden states of each row's own tokens."""
    x = inputs_of(name, rows, width, side)
    hidden: Any = harness.run(model, x)[0]
    return [hidden[b][x["attention_mask"][b].bool()] for b in range(len(rows))]


@pytest.mark.parametrize("name", SPECIES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.integers(0, len(PLANS) - 1),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    surplus=st.integers(0, 20),
    side=st.sampled_from(["left", "right"]),
    place=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_a_row_alone_equals_the_row_in_company(
    name: str, plan: int, lengths: list[int], surplus: int, side: str, place: int, seed: int
) -> None:
    model = module(name, plan)
    rows = [row(n, seed + i) for i, n in enumerate(lengths)]
    place %= len(rows)
    mine = rows[place]
    [alone] = states(name, model, [mine], len(mine), "right")
    in_company = states(name, model, rows, max(lengths) + surplus, side)[place]
    assert float((alone - in_company).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", SPECIES)
def test_the_dense_models_are_invariant_themselves(name: str) -> None:
    """Else the property above could not hold, and would say nothing."""
    model = zoo.tiny(name)
    rows = [row(9, 1), row(14, 2)]
    [alone] = states(name, model, rows[:1], 9, "right")
    for side in ("left", "right"):
        assert float((states(name, model, rows, 20, side)[0] - alone).abs().max()) < TOLERANCE


def test_the_order_of_rows_does_not_matter() -> None:
    model = module("bert", 2)
    rows = [row(n, n) for n in (4, 9, 16)]
    one = states("bert", model, rows, 18, "right")
    two = states("bert", model, rows[::-1], 18, "right")[::-1]
    for a, b in zip(one, two, strict=True):
        assert float((a - b).abs().max()) < TOLERANCE


def test_holes_in_the_mask_are_padding_too() -> None:
    """Live tokens need not stand together: counts and protected places go by live tokens alone."""
    plan = PLANS[2]
    model = module("deberta-v2", 2)
    x = zoo.batch([12, 12], seed=8)
    x["attention_mask"][0, [0, 4, 5, 11]] = 0
    masked = harness.pruned(harness.captured("deberta-v2"), plan, "mask").graph_module
    assert harness.difference(harness.run(model, x), harness.run(masked, x), x["attention_mask"].bool()) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_places_are_those_of_the_row_after_pruning_too(name: str) -> None:
    """Gathered tokens carry their places along: as in the model that only hides what is pruned."""
    x = inputs_of(name, [row(n, n) for n in (12, 17, 3)], 20, "right")
    gathered = module(name, len(PLANS) - 1)
    masked = harness.pruned(harness.captured(name, inputs=tuple(x)), PLANS[-1], "mask").graph_module
    live = x["attention_mask"].bool()
    assert harness.difference(harness.run(masked, x), harness.run(gathered, x), live) < TOLERANCE
