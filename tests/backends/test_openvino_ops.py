"""What the converter does not know, or computes slowly, in other operators: the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from prunepass.backends._openvino_ops import spell_out

aten = torch.ops.aten


class Sort(nn.Module):
    def __init__(self, descending: bool) -> None:
        super().__init__()
        self.descending = descending

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.sort(x, dim=1, descending=self.descending, stable=True)
        return found.values, found.indices


def program(descending: bool, longest: int | None) -> ExportedProgram:
    length = Dim("length", max=longest) if longest else Dim("length")
    shapes: Any = ({0: Dim("batch"), 1: length},)
    return torch.export.export(Sort(descending), (torch.randn(3, 9),), dynamic_shapes=shapes)


@pytest.fixture(scope="module", name="sorts", params=[(d, n) for d in (False, True) for n in (512, None)], ids=str)
def _sorts(request: pytest.FixtureRequest) -> tuple[bool, nn.Module]:
    descending, longest = request.param
    found = program(descending, longest)
    spell_out(found)
    assert aten.sort.stable not in {n.target for n in found.graph.nodes}
    return descending, found.graph_module


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(2, 4), length=st.integers(2, 40), different=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_a_stable_sort_is_one_still(
    sorts: tuple[bool, nn.Module], rows: int, length: int, different: int, seed: int
) -> None:
    descending, module = sorts
    x = torch.randint(different, (rows, length), generator=torch.Generator().manual_seed(seed)).float()
    wanted = torch.sort(x, dim=1, descending=descending, stable=True)
    for found, exact in zip(module(x), wanted, strict=True):
        assert torch.equal(found, exact)


def test_rows_too_long_for_32_bits_are_sorted_all_the_same() -> None:
    found = program(True, None)
    spell_out(found)
    x = torch.randint(20_000, (2, 50_000), generator=torch.Generator().manual_seed(0)).float()
    values, slots = found.graph_module(x)
    assert torch.equal(values, x.sort(dim=1, descending=True).values)
    assert torch.equal(x.gather(1, slots), values)
    assert torch.equal(slots.sort(dim=1).values, torch.arange(50_000).expand(2, -1))


@pytest.mark.parametrize("longest", [512, None])
def test_the_plugins_unstable_sort_makes_a_stable_one(longest: int | None) -> None:
    openvino = pytest.importorskip("openvino")
    from prunepass.backends.openvino import convert

    compiled = openvino.compile_model(convert(program(True, longest)), "CPU")
    operators = [op for op in compiled.get_runtime_model().get_ops() if op.get_rt_info()["layerType"].value == "TopK"]
    assert len(operators) == 2
    for length, different in ((1, 1), (2, 1), (300, 2), (300, 90)):
        x = torch.randint(different, (4, length), generator=torch.Generator().manual_seed(1)).float()
        wanted = torch.sort(x, dim=1, descending=True, stable=True)
        for found, exact in zip(compiled(x.numpy()).values(), wanted, strict=True):
            assert torch.equal(torch.from_numpy(found).long(), exact.long())
