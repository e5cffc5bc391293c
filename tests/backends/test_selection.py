"""The choice of tokens on every runtime against plain Python: counts, order, infinite and NaN scores, half types."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import oracle
from prunepass import Protect, Stage
from prunepass.backends import onnxruntime as onnx_target
from prunepass.backends import openvino as openvino_target
from prunepass.passes.live import live_tokens
from prunepass.passes.select import select
from prunepass.plan import kept_count, share_of

Run = Callable[..., Sequence[Any]]
#: on a threshold of 8 or 24 bits, or of the long division by which counts are computed
SHARES = [Fraction(s) for s in ("1/2", "7/10", "1/3", "4097/8192", "9999/10000", "9973/9999", "1/9999")]
PLANS = {
    "half": ("1/2", Protect(first=1)),
    "fine": ("4097/8192", Protect(first=0)),
    "all kinds": ("9/10", Protect(first=2, last=1, token_ids=(3, 7), last_share=Fraction(1, 10))),
}
RUNTIMES = ("eager", "onnxruntime", "openvino f32", "openvino bf16")


class Choice(nn.Module):
    """The tokens of one stage from given scores: index, positions and, as numbers, which slots are alive."""

    def __init__(self, keep: str, protect: Protect) -> None:
        super().__init__()
        self.stage, self.protect = Stage(0, keep), protect  # type: ignore[arg-type]  # text is a fraction, too

    def forward(self, scores: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        row = live_tokens(ids, mask, ids, self.protect)
        named = {"order": row.order, "count": row.count, "padding": row.padding}
        chosen = select(scores, ids.shape[1], self.stage, self.protect, **named)
        assert chosen.alive is not None
        return chosen.index, chosen.positions, chosen.alive.to(torch.int64)


def batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (some infinite, some NaN, every second batch full of ties), mask (padded on either side) and ids."""
    generator = torch.Generator().manual_seed(seed)
    scores = (10 * torch.randn(rows, length, generator=generator)).bfloat16().float()
    scores = scores.round() if seed % 2 else scores
    kind = torch.randint(0, 12, (rows, length), generator=generator)
    for i, value in enumerate((float("inf"), float("-inf"), float("nan"))):
        scores = scores.masked_fill(kind == i, value)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for b in range(rows):
        padding = int(torch.randint(0, length, (1,), generator=generator))
        mask[b, :padding] = b % 2
        mask[b, length - padding :] &= 1 - b % 2
    return scores, mask, torch.randint(0, 9, (rows, length), generator=generator)


def exported(module: nn.Module, example: Sequence[Tensor]) -> ExportedProgram:
    open_dims = tuple(dict.fromkeys(range(x.dim()), Dim.AUTO) for x in example)
    program = torch.export.export(module, tuple(example), dynamic_shapes=open_dims)
    program._guards_code = []
    return program


def openvino_runs(model: Any, precision: str) -> Run:
    core = openvino_target.require().Core()
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})

    def run(*tensors: Tensor) -> Sequence[Any]:
        results = compiled([x.numpy() for x in tensors])
        return [results[i] for i in range(len(compiled.outputs))]

    return run


def onnx_runs(model: Any, dtype: torch.dtype = torch.float32) -> Run:
    session = onnx_target.require("onnxruntime").InferenceSession(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]

    def run(*tensors: Tensor) -> Sequence[Any]:
        given = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
        found: Sequence[Any] = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})
        return found

    return run


@cache
def runs(plan: str) -> dict[str, Run]:
    """The choice on every runtime; float16 by the conversion that people use for ONNX files."""
    onnx = pytest.importorskip("onnx")
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    module = Choice(*PLANS[plan])
    program = exported(module, batch(2, 311, 0))
    converted = onnx_target.convert(program).model_proto
    half = float16.convert_float_to_float16(onnx.ModelProto.FromString(converted.SerializeToString()))
    model = openvino_target.convert(program)
    return {
        "eager": module,
        "onnxruntime": onnx_runs(converted),
        "onnxruntime float16": onnx_runs(half, torch.float16),
        "openvino f32": openvino_runs(model, "f32"),
        "openvino bf16": openvino_runs(model, "bf16"),
        "eager float16": lambda scores, *rest: module(scores.half(), *rest),
        "eager bfloat16": lambda scores, *rest: module(scores.bfloat16(), *rest),
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("runtime", [*RUNTIMES, "onnxruntime float16", "eager float16", "eager bfloat16"])
def test_every_runtime_keeps_the_tokens_of_the_reference(runtime: str, plan: str) -> None:
    keep, protect = PLANS[plan]
    run = runs(plan)[runtime]
    for rows, length in ((1, 4), (3, 12), (2, 255), (2, 256), (4, 257), (4, 700)):
        for seed in (0, 1):
            scores, mask, ids = batch(rows, length, seed)
            index, positions, alive = (torch.as_tensor(np.asarray(x)) for x in run(scores, mask, ids))
            live = mask.bool()
            expected = oracle.select_rows(scores, live, live, ids, Fraction(keep), protect)
            found = torch.zeros_like(mask).scatter_add_(1, positions, alive.to(torch.int64))
            assert torch.equal(found, expected.to(torch.int64)), (rows, length, seed)
            assert bool((index.diff(dim=1) > 0).all())
            assert index.shape[1] == max(1, oracle.count(length, Fraction(keep), protect))
            assert not mask.gather(1, positions)[~alive.bool()].any()


class Counts(nn.Module):
    """How many of n each share keeps: of a row (a tensor), and of a length (a size)."""

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        length = numbers.shape[0]
        rows = [kept_count(numbers, share, Protect()) for share in SHARES]
        widths = [torch.arange(share_of(length, share))[-1:] + 1 for share in SHARES]
        return torch.stack(rows), torch.stack(widths)


LENGTHS = [8192, 9999, 10_000, 70_000, 2**20 - 1, 2**20]


@pytest.fixture(scope="module")
def counts() -> dict[str, Run]:
    module = Counts()
    program = exported(module, [torch.arange(20_011)])
    model = openvino_target.convert(program)
    model.reshape([-1])  # the last of a count's numbers is read, which tracing takes for a bound of the length
    return {
        "eager": module,
        "onnxruntime": onnx_runs(onnx_target.convert(program).model_proto),
        "openvino f32": openvino_runs(model, "f32"),
        "openvino bf16": openvino_runs(model, "bf16"),
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_counts_are_exact_up_to_a_million_tokens(runtime: str, counts: dict[str, Run]) -> None:
    for length in LENGTHS:
        numbers = torch.randint(0, 2**20 + 1, (length,), generator=torch.Generator().manual_seed(length))
        numbers[: len(LENGTHS)] = torch.tensor(LENGTHS)
        rows, widths = (torch.as_tensor(np.asarray(x)).to(torch.int64) for x in counts[runtime](numbers))
        expected = torch.stack([-(-numbers * s.numerator // s.denominator) for s in SHARES])
        assert torch.equal(rows, expected), length
        assert widths[:, 0].tolist() == [-(-length * s.numerator // s.denominator) for s in SHARES]


class _Narrow(int):
    """A whole number that refuses to leave what float32 holds exactly, and to be negative."""

    def _checked(self, value: int) -> _Narrow:
        assert 0 <= value <= 2**24, f"{value} is not exact in float32"
        return _Narrow(value)

    def __mul__(self, other: int) -> _Narrow:
        return self._checked(int(self) * int(other))

    def __add__(self, other: int) -> _Narrow:
        return self._checked(int(self) + int(other))

    def __sub__(self, other: int) -> _Narrow:
        return self._checked(int(self) - int(other))

    def __floordiv__(self, other: int) -> _Narrow:
        return self._checked(int(self) // int(other))

    __rmul__, __radd__ = __mul__, __add__


def test_no_number_on_the_way_leaves_what_float32_holds() -> None:
    chance = random.Random(0)
    for _ in range(20_000):
        under = chance.choice((chance.randint(1, 10_000), chance.randint(9_900, 10_000)))
        share = Fraction(chance.randint(1, under), under)
        n = chance.choice((2**20, chance.randint(0, 2**20), chance.randint(0, 20_000), under * chance.randint(0, 100)))
        expected = -(-n * share.numerator // share.denominator)
        assert share_of(_Narrow(n), share) == expected
        assert share_of(_Narrow(n), share, longest=chance.randint(n, 2**20)) == expected
