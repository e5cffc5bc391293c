"""Dynamo's graphs: static lengths baked in as integers, automatic dynamic, and dynamic from the start.

The backend here does nothing but prune, so that what is tested is the reading of the graph. Results must equal those of
the exported model, pruned by the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import harness
import oracle
import prunepass
import toys
import zoo
from prunepass import Protect, PrunePlan, Stage

TOLERANCE = 1e-10
PLAN = PrunePlan((Stage(1, 0.7), Stage(2, 0.4, "norm")), protect=Protect(first=1, last=1))
NAMES = ("bert", "llama", "deberta-v2", "modernbert")
# A vocabulary that a length can reach without leaving the positions behind.
OPTIONS: dict[str, Any] = {"vocab_size": 48, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def _exact_softmax_and_fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with oracle.float64_softmax():
        yield
    torch._dynamo.reset()


class Pruner:
    """A Dynamo backend that prunes and counts its compilations."""

    def __init__(self, plan: PrunePlan = PLAN) -> None:
        self.plan = plan
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        pruned = prunepass.prune(gm, self.plan)
        placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        assert [n.name for n in pruned.graph.find_nodes(op="placeholder")] == placeholders
        self.graphs.append(pruned)
        return pruned


@cache
def model(name: str) -> nn.Module:
    return zoo.tiny(name, **OPTIONS)


def example() -> dict[str, Tensor]:
    x = harness.example()
    return {**x, "input_ids": x["input_ids"] % OPTIONS["vocab_size"]}


@cache
def reference(name: str) -> nn.Module:
    return prunepass.prune(model(name), PLAN, example())


def gap(name: str, compiled: Any, x: dict[str, Tensor]) -> float:
    return harness.difference(harness.run(compiled, x), harness.run(reference(name), x), x["attention_mask"].bool())


def padded(batch: int, length: int) -> dict[str, Tensor]:
    """A full row, and shorter ones beside it."""
    lengths = [max(1, length - 2 * b % length) for b in range(batch)]
    return zoo.batch(lengths, width=length, seed=batch + length, high=OPTIONS["vocab_size"])


COLLISIONS = {
    "batch and head size": (8, 8),
    "heads": (3, 4),
    "layers": (2, 3),
    "hidden width": (2, 32),
    "intermediate width": (2, 40),
    "vocabulary": (2, 48),
    "most positions": (2, 64),
    "tokens of the batch equal to the width": (2, 16),
    "one row": (1, 12),
    "one row of a width": (1, 32),
    "two tokens": (2, 2),
}


ALL_SIZES = ("llama",)
SOME_SIZES = {("bert", "batch and head size"), ("bert", "most positions")}


@pytest.mark.parametrize(
    ("name", "collision"),
    [
        pytest.param(
            name, collision, marks=() if name in ALL_SIZES or (name, collision) in SOME_SIZES else pytest.mark.slow
        )
        for name in NAMES
        for collision in COLLISIONS
    ],
)
def test_static_lengths_that_equal_another_size(name: str, collision: str) -> None:
    pruner = Pruner()
    compiled = torch.compile(model(name), backend=pruner, dynamic=False, fullgraph=True)
    x = padded(*COLLISIONS[collision])
    assert gap(name, compiled, x) < TOLERANCE
    assert len(pruner.graphs) == 1


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_automatic_dynamic_lengths(name: str) -> None:
    """The first length is static; the second makes lengths symbolic; later ones reuse that graph."""
    pruner = Pruner()
    compiled = torch.compile(model(name), backend=pruner)
    for shape in [(2, 11), (2, 17), (3, 8), (2, 32), (2, 11)]:
        assert gap(name, compiled, padded(*shape)) < TOLERANCE, shape
    assert len(pruner.graphs) <= 4


@pytest.mark.parametrize("name", ["deberta-v2", "modernbert"])
def test_dynamic_from_the_start(name: str) -> None:
    reference(name)  # torch.export puts copies in the place of a module's lists, which a graph's guards would notice
    pruner = Pruner()
    compiled = torch.compile(model(name), backend=pruner, dynamic=True)
    for shape in [(2, 11), (3, 17), (4, 8), (2, 32)]:
        assert gap(name, compiled, padded(*shape)) < TOLERANCE, shape
    assert len(pruner.graphs) == 1


@pytest.mark.parametrize(("name", "dynamic"), [("bert", False), ("llama", True)])
def test_gradients_pass_through_the_pruned_graph(name: str, dynamic: bool) -> None:
    x = padded(2, 13)
    live = x["attention_mask"].bool()
    parameters = list(model(name).parameters())

    def gradients(run: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        loss = run(**x).last_hidden_state[live].square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    compiled = gradients(torch.compile(model(name), backend=Pruner(), dynamic=dynamic, fullgraph=True))
    exported = gradients(reference(name))
    assert sum(g is not None for g in compiled) > 20
    for one, two in zip(compiled, exported, strict=True):
        assert (one is None) == (two is None)
        assert one is None or two is None or torch.allclose(one, two, atol=1e-8)


def test_two_models_compiled_at_once_do_not_mix() -> None:
    x = padded(2, 12)
    one, two = (torch.compile(model(n), backend=Pruner(), dynamic=False) for n in ("bert", "llama"))
    for _ in range(2):
        assert gap("bert", one, x) < TOLERANCE
        assert gap("llama", two, x) < TOLERANCE


def test_parameters_changed_after_compilation_are_seen() -> None:
    changed = zoo.tiny("bert", **OPTIONS)
    compiled = torch.compile(changed, backend=Pruner(), dynamic=False)
    x = padded(2, 12)
    before = harness.run(compiled, x)
    zoo.randomize(changed, seed=5)
    expected = harness.run(prunepass.prune(changed, PLAN, example()), x)
    live = x["attention_mask"].bool()
    assert harness.difference(harness.run(compiled, x), expected, live) < TOLERANCE
    assert harness.difference(before, expected, live) > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_static_graphs_get_static_kept_lengths(name: str) -> None:
    """Runtimes plan memory by the lengths they are given: a static graph stays static."""
    pruner = Pruner()
    harness.run(torch.compile(model(name), backend=pruner, dynamic=False), padded(2, 20))
    [gm] = pruner.graphs
    attentions = [n for n in gm.graph.nodes if n.target is harness.aten.scaled_dot_product_attention.default]
    widths = [n.args[0].meta["val"].shape[-2] for n in attentions]
    assert widths == [20] + [oracle.count(20, s.keep, PLAN.protect) for s in PLAN.stages]
    assert all(isinstance(w, int) for w in widths)


def test_views_that_hang_on_a_kernels_strides() -> None:
    """Fused attention gives its heads back side by side, so a view puts them together; other kernels do not."""
    toy = toys.encoder(kind="viewed").double().eval()
    x = {**zoo.batch([17, 12, 9], width=17, seed=3)}
    pruner = Pruner()
    torch.compile(toy, backend=pruner, dynamic=False)(**x)
    assert len(pruner.graphs) == 1
    found = harness.run(torch.compile(toy, backend=pruner, dynamic=False), x)
    expected = harness.run(prunepass.prune(toy, PLAN, zoo.batch([11, 7], width=11, seed=4)), x)
    assert harness.difference(found, expected, x["attention_mask"].bool()) < TOLERANCE
