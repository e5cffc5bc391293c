"""Every operator of `parity`'s table means on every target what it means in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import parity
import pytest
import torch
from runtimes import CONFIG, lowered
from torch import Tensor, nn
from torch.export import Dim

TARGETS = (
    "openvino",
    pytest.param("onnxruntime", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
)


def exported(module: nn.Module, example: tuple[Tensor, ...]) -> Any:
    dims = tuple(dict.fromkeys(range(x.dim()), Dim.AUTO) for x in example)
    return torch.export.export(module, example, dynamic_shapes=dims)


def runner(module: nn.Module, target: str, example: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The module on a target, at all sizes."""
    if target == "inductor":
        return lowered(module, target, dynamic=True)
    from prunepass.backends import get_target
    from prunepass.backends._programs import output_dtypes

    lowering: Any = get_target(target)
    program = exported(module, example)
    dtypes = output_dtypes(program)
    if target == "openvino":
        session = lowering._session(program, make=lowering.convert, settings=CONFIG[target])
    else:
        session = lowering._session(program, settings={})
    assert len(dtypes) == len(module(*example))
    return lambda *columns: session(columns)


def same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found, wanted, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("group", parity.GROUPS)
@pytest.mark.parametrize("target", TARGETS)
def test_values(target: str, group: str) -> None:
    torch._dynamo.reset()
    module = parity.GROUPS[group].module(target)
    run = runner(module, target, parity.Inputs.draw(2, 9).columns())
    wrong = []
    for size in parity.SIZES:
        wrong += differing(module, run, size)
    assert not wrong


def differing(module: Any, run: Callable[..., Any], size: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
    columns = parity.Inputs.draw(*size).columns()
    with torch.no_grad():
        results = zip(module.cases, run(*columns), module(*columns), strict=False)
    return [(name, size) for name, found, wanted in results if not same(found, wanted)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "size"), [*((name, (1, 70_000)) for name in parity.GROUPS), ("counting", (1, 9)), ("arithmetic", (2, 1))]
)
@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "inductor"])
def test_values_of_one_token_and_of_very_long_rows(target: str, group: str, size: tuple[int, int]) -> None:
    """More tokens than 16 bits count. Which of many equal values its own ``topk`` takes, PyTorch leaves open there."""
    torch._dynamo.reset()
    module = parity.GROUPS[group].module(target)
    run = runner(module, target, parity.Inputs.draw(2, 9).columns())
    assert {name for name, _ in differing(module, run, size)} <= {"topk, places"}
