"""Feed-forward parts of long rows, some tokens after the others: the values stay, and the memory of wide ones goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.backends import _slices
from prunepass.backends._slices import AttendInSlices, InSlices, in_slices
from prunepass.graph.capture import capture_module
from prunepass.graph.ops import SDPA

PLAN = PrunePlan((Stage(2, 0.5),), "norm", Protect(first=1, last=1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_slices, "SLICE", 4)
    return


class Widest(TorchDispatchMode):
    """The most tokens that one value of a given width held."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 3 and out.shape[-1] == self.width:
            self.most = max(self.most, out.shape[1])
        return out


def parts(gm: GraphModule) -> list[InSlices]:
    return [m for m in gm.modules() if isinstance(m, InSlices)]


@pytest.mark.usefixtures("small")
def test_a_pruned_model_gives_what_it_gave() -> None:
    made: list[Any] = []

    class Target:
        def lower(self, gm: GraphModule, inputs: Any, *, config: Any = None) -> Any:
            made.append(in_slices(gm))
            assert made[-1] is not gm
            return made[-1]

    x = {name: value.repeat(2, 1) for name, value in zoo.batch([19, 11], seed=1, side="left").items()}

    class Whole:
        def lower(self, gm: GraphModule, inputs: Any, *, config: Any = None) -> Any:
            return gm

    found = []
    for target in (Target(), Whole()):
        model = zoo.tiny("llama", "causal")
        torch._dynamo.reset()
        model.compile(backend="tokprune", options={"plan": PLAN, "target": target}, dynamic=True)
        with torch.no_grad(), oracle.float64_softmax():
            found.append(model(**x, use_cache=True, logits_to_keep=1).logits)
    assert len(parts(made[0])) == zoo.LAYERS - 1  # the last block works on one token
    dense = zoo.tiny("llama", "causal")
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert not torch.equal(found[0], dense(**x, logits_to_keep=1).logits)


class Part(nn.Module):
    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.nn.functional.gelu(self.up(self.norm(x)))
        if self.mixed:
            wide = wide - wide.mean(1, keepdim=True)
        return x + self.down(wide)


def graph_of(module: nn.Module, x: Tensor) -> GraphModule:
    return capture_module(module.double().eval(), {"x": x}).graph_module


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("length", [1, 7, 8, 9, 21])
def test_any_length_gives_the_same(length: int) -> None:
    torch.manual_seed(0)
    module = Part()
    gm = graph_of(module, torch.randn(2, 11, 8, dtype=torch.float64))
    sliced = in_slices(gm)
    assert len(parts(sliced)) == 1
    assert not parts(gm)
    x = torch.randn(3, length, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(sliced(x), module(x), rtol=0, atol=1e-14)
    grown = x.clone().requires_grad_()
    sliced(grown).sum().backward()
    assert grown.grad is not None


@pytest.mark.usefixtures("small")
def test_fewer_wide_values_are_held() -> None:
    module = Part()
    sliced = in_slices(graph_of(module, torch.randn(2, 11, 8, dtype=torch.float64)))
    held = []
    for one in (module, sliced):
        with torch.no_grad(), Widest(32) as wide:
            one(torch.randn(1, 30, 8, dtype=torch.float64))
        held.append(wide.most)
    assert held == [30, 4]


def test_what_mixes_tokens_stays_whole() -> None:
    gm = graph_of(Part(mixed=True), torch.randn(2, 11, 8, dtype=torch.float64))
    assert in_slices(gm) is gm


class Attention(nn.Module):
    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        places = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
        if self.window is not None:
            places = places.triu(1 - self.window)
        seen = mask[:, None, None, :].bool() & places.bool()
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("length", [3, 8, 21])
def test_queries_come_some_after_the_others(length: int) -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 11, dtype=torch.int64)
    captured = capture_module(Attention(), {"x": torch.randn(2, 11, 8, dtype=torch.float64), "mask": mask})
    sliced = in_slices(captured.graph_module)
    assert any(isinstance(m, AttendInSlices) for m in sliced.modules())
    x, mask = torch.randn(3, length, 8, dtype=torch.float64), torch.ones(3, length, dtype=torch.int64)
    mask[1, 0] = 0
    with torch.no_grad():
        torch.testing.assert_close(sliced(x, mask), Attention()(x, mask), rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("window", [None, 3])
def test_keys_that_no_query_of_a_slice_sees_are_left_out(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module, length = Attention(window), 16
    example = {"x": torch.randn(2, 11, 8, dtype=torch.float64), "mask": torch.ones(2, 11, dtype=torch.int64)}
    sliced = in_slices(capture_module(module, example).graph_module)
    x, mask = torch.randn(2, length, 8, dtype=torch.float64), torch.ones(2, length, dtype=torch.int64)
    mask[:, :9] = 0  # of both rows: two slices in which no query sees a key
    mask[1, -2:] = 0
    attended: list[int] = []

    def noted(query: Tensor, key: Tensor, *more: Any, **options: Any) -> Tensor:
        attended.append(key.shape[2])
        found: Tensor = SDPA(query, key, *more, **options)
        return found

    monkeypatch.setattr(_slices, "SDPA", noted)
    with torch.no_grad():
        found = sliced(x, mask)
    torch.testing.assert_close(found, module(x, mask), rtol=0, atol=1e-14, equal_nan=True)
    assert attended == [16, 16, 3, 7] if window is None else [16, 16, 3, 6]
