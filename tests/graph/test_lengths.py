"""A static Dynamo graph, its lengths made values again, computes the model at lengths that it was never traced at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import harness
import oracle
import toys
import zoo
from prunepass.errors import RefusalError
from prunepass.graph.capture import capture_dynamo
from prunepass.graph.inputs import input_name
from prunepass.graph.lengths import resolve_lengths
from prunepass.graph.streams import find_inputs

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _exact_softmax_and_fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with oracle.float64_softmax():
        yield
    torch._dynamo.reset()


class Static:
    """The static graph of a model at the shape of ``x``, resolved; called with inputs of any other shape."""

    def __init__(self, model: nn.Module, x: dict[str, Tensor]) -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=self._resolve, dynamic=False, fullgraph=True)(**x)

    def _resolve(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        self.values = example_inputs
        self.graph_module = capture_dynamo(gm)
        inputs = find_inputs(self.graph_module)
        self.names = [input_name(n) for n in self.graph_module.graph.find_nodes(op="placeholder")]
        resolve_lengths(self.graph_module, inputs)
        self.graph_module.graph.lint()
        self.graph_module.recompile()
        return gm

    def __call__(self, x: dict[str, Tensor]) -> Tensor:
        assert x.keys() <= set(self.names)
        values = [x.get(name, value) for name, value in zip(self.names, self.values, strict=True)]
        with torch.no_grad():
            output = self.graph_module(*values)
        return output[0] if isinstance(output, (tuple, list)) else output


def rows(batch: int, length: int, high: int = zoo.VOCABULARY) -> dict[str, Tensor]:
    return zoo.batch([max(1, length - 3 * b % length) for b in range(batch)], width=length, seed=length, high=high)


def worst_gap(model: nn.Module, traced_at: tuple[int, int], others: list[tuple[int, int]], high: int) -> float:
    static = Static(model, rows(*traced_at, high))
    worst = 0.0
    for shape in [traced_at, *others]:
        x = rows(*shape, high)
        expected = harness.run(model, x)
        expected = expected if isinstance(expected, Tensor) else expected[0]
        worst = max(worst, harness.difference(static(x), expected, x["attention_mask"].bool()))
    return worst


OTHERS = [(2, 12), (3, 7), (5, 26), (4, 8)]

COLLISIONS = {
    "batch and head size": (8, 8),
    "heads": (3, 4),
    "hidden width": (2, 32),
    "intermediate width": (2, 40),
    "vocabulary": (2, 48),
    "most positions": (2, 64),
    "three": (3, 3),
    "two": (2, 2),
    "heads and batch": (4, 4),
}


SOME_SIZES = ("batch and head size", "most positions", "heads and batch")


@pytest.mark.parametrize(
    ("name", "collision"),
    [
        pytest.param(name, collision, marks=() if collision in SOME_SIZES else pytest.mark.slow)
        for name in ("bert", "llama", "deberta-v2", "modernbert")
        for collision in COLLISIONS
    ],
)
def test_lengths_that_equal_another_size(name: str, collision: str) -> None:
    assert worst_gap(zoo.tiny(name, vocab_size=48, num_hidden_layers=2), COLLISIONS[collision], OTHERS, 48) < TOLERANCE


#: what Dynamo alone gives of these is not to be called at other lengths: CTRL's graph returns its table first, XLM's
#: checks the lengths that it was traced at, and experts are traced in a form of prunepass's own (`graph.experts`)
NOT_ALONE = ("ctrl", "xlm", "mixtral", "qwen3_moe")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 11), (8, 8), (4, 32), (2, 4)])
@pytest.mark.parametrize("name", [name for name in zoo.SPECIES if name not in NOT_ALONE])
def test_every_architecture(name: str, shape: tuple[int, int]) -> None:
    model = zoo.tiny(name)
    assert worst_gap(model, shape, OTHERS, zoo.VOCABULARY) < TOLERANCE


@pytest.mark.parametrize("shape", [(toys.HEADS, toys.HEADS), (2, toys.WIDTH)])
@pytest.mark.parametrize("extra", toys.TOKENWISE)
def test_operations_on_each_token(extra: str, shape: tuple[int, int]) -> None:
    model = toys.encoder(toys.TOKENWISE[extra], at=0, layers=1)
    assert worst_gap(model, shape, OTHERS, zoo.VOCABULARY) < TOLERANCE


def test_one_row_stays_one_row() -> None:
    """torch.compile specialises a batch of one, and guards on it: only the length becomes a value.

    A slice ``x[:, :12]`` may stay as it is, since a graph traced at 12 tokens never meets more.
    """
    assert (
        worst_gap(zoo.tiny("bert", num_hidden_layers=2), (1, 12), [(1, 7), (1, 11), (1, 1)], zoo.VOCABULARY) < TOLERANCE
    )


class Pieces(nn.Module):
    """Cuts the sequence into 4 pieces of 3, whatever its length: right at 12 tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.encoder(layers=2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.inner(input_ids, attention_mask)
        pieces = torch.stack([x[:, 0:3], x[:, 3:6], x[:, 6:9], x[:, 9:12]], 1)
        return pieces.mean(2).repeat_interleave(3, 1)


def test_a_model_made_for_one_length_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed) as failure:
        Static(Pieces(), rows(2, 12))
    refusal = failure.value.inner_exception
    assert isinstance(refusal, RefusalError)
    assert refusal.where
    assert "length" in refusal.reason
