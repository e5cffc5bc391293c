"""Graphs in OpenVINO's own operators: the same values as PyTorch's, from fewer operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtimes import bert, text
from torch import Tensor, nn
from torch.export import Dim

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.passes.take import take

openvino = pytest.importorskip("openvino")

from prunepass.backends.openvino import convert  # needs the runtime

SIZES = ((1, 2, 1), (2, 7, 3), (5, 40, 40), (3, 300, 129))


class Gathers(nn.Module):
    """Everything that a stage gathers: states, masks of either axis, what all rows share, and numbers."""

    def forward(self, x: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        shared = x[:1].transpose(0, 1)[:, 0]
        heads = take(x, index, 1, 0).unflatten(2, (2, 4)).transpose(1, 2)
        return (
            heads.transpose(1, 2).flatten(2),
            take(mask[:, None, None, :], index, 3, 0),
            take(mask[:, None, :, None], index, 2, 0),
            take(shared[None], index, 1, 0, shared=True),
            take(mask, index, 1, 0),
            torch.arange(index.shape[1])[None, :] + index,
        )


class Attends(nn.Module):
    """Attention as transformers masks it for encoders."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[2])
        rows = torch.arange(x.shape[0])[:, None, None, None]
        every = torch.ones((), dtype=torch.bool) & (places[None, None, :, None] >= 0)
        seen = every & mask[rows, places[None, None, None, :]]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen.expand(-1, 1, x.shape[2], x.shape[2]))


def converted(module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...]) -> Any:
    return convert(torch.export.export(module.eval(), example, dynamic_shapes=shapes))


class Reads(nn.Module):
    """One of three inputs."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a, b, c)[self.which] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("which", range(3))
def test_inputs_that_nothing_reads_stay(which: int, dtype: torch.dtype) -> None:
    example = (torch.ones(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    batch = Dim("batch", max=64)
    model = converted(Reads(which), example, ({0: batch},) * 3)
    assert [port.get_any_name() for port in model.inputs] == ["a", "b", "c"]
    assert [str(port.get_partial_shape()) for port in model.inputs] == ["[1..64,3,4]"] * 3
    compiled, _ = executed(model)
    found = torch.from_numpy(compiled([x.numpy() for x in example])[0])
    torch.testing.assert_close(found.to(torch.float32), (example[which] * 2).to(torch.float32))


def executed(model: Any) -> tuple[Any, Counter[str]]:
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled, Counter(op.get_rt_info()["layerType"].value for op in compiled.get_runtime_model().get_ops())


def gathers(batch: int, length: int, count: int) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 8, generator=made)
    mask = torch.rand(batch, length, generator=made) < 0.5
    index = torch.stack([torch.randperm(length, generator=made)[:count].sort().values for _ in range(batch)])
    return x, mask, index


def test_gathers_give_the_same_values_at_all_sizes() -> None:
    batch, length, count = (Dim(name, min=1) for name in ("batch", "length", "count"))
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch, 1: count})
    model, kinds = executed(converted(Gathers(), gathers(2, 9, 4), shapes))
    assert kinds["Gather"] >= 5
    assert kinds["Concatenation"] == 0, "sizes are not put together from numbers"
    for size in SIZES:
        inputs = gathers(*size)
        found = model([t.numpy() for t in inputs])
        for i, wanted in enumerate(Gathers()(*inputs)):
            assert torch.equal(torch.from_numpy(found[i]).to(wanted.dtype), wanted), (size, i)


def test_a_mask_that_is_always_true_is_not_computed_and_one_by_keys_stays_narrow() -> None:
    batch, length = Dim("batch", min=1), Dim("length", min=1)

    def inputs(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        made = torch.Generator().manual_seed(tokens)
        mask = torch.rand(rows, tokens, generator=made) < 0.5
        mask[:, 0] = True
        return torch.randn(rows, 2, tokens, 8, generator=made), mask

    program = converted(Attends(), inputs(2, 9), ({0: batch, 2: length}, {0: batch, 1: length}))
    kinds = Counter(op.get_type_name() for op in program.get_ops())
    assert kinds["GreaterEqual"] == 0
    assert kinds["Broadcast"] == 0
    model, _ = executed(program)
    for rows, tokens in ((1, 1), (3, 5), (2, 64)):
        x, mask = inputs(rows, tokens)
        torch.testing.assert_close(torch.from_numpy(model([x.numpy(), mask.numpy()])[0]), Attends()(x, mask))


def test_what_a_stage_adds_is_small() -> None:
    counts = []
    for stages in (1, 2):
        plan = PrunePlan([Stage(i + 1, keep) for i, keep in enumerate(("0.7", "0.4")[:stages])], "norm")
        _, kinds = executed(convert(prunepass.prune(bert(num_layers=3), plan, text(2, 12)).exported))
        kinds.pop("Const"), kinds.pop("Reorder", 0)
        counts.append(sum(kinds.values()))
    assert counts[1] - counts[0] <= 25, counts
