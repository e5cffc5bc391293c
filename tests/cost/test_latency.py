"""Latency tables: curves, measuring on a real target with a counted clock, and files. No test reads the real clock."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import harness
import zoo
from prunepass import PrunePlan, Stage
from prunepass.cost import CostModel, plan_cost, plan_share
from prunepass.cost import measure as measuring
from prunepass.cost.blocks import BlockCosts
from prunepass.cost.curve import Curve, never_falling
from prunepass.cost.latency import Conditions, LatencyTable
from prunepass.errors import OptionError

CURVE = Curve((8, 16, 32), (1.0, 2.0, 6.0))
CONDITIONS = Conditions("Toy", "eager", "float32", "auto", 1, 1, {}, "attention", None, 3, {"torch": "2"}, "cpu")
TABLE = LatencyTable((8, 16), ((0.01, 0.02), (0.01, 0.03)), (0.001, 0.001), (0.002, 0.004), CONDITIONS)


def counts(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_points_and_on() -> None:
    n = counts(0, 1, 8, 12, 16, 24, 32, 40)
    assert CURVE(n).tolist() == pytest.approx([1, 1, 1, 1.5, 2, 4, 6, 8])
    assert CURVE(n.reshape(2, 4)).shape == (2, 4)
    assert CURVE(n.float()).dtype == torch.float32


def test_a_curve_has_gradients() -> None:
    n = counts(3, 11, 20, 50).requires_grad_()
    CURVE(n).sum().backward()
    assert n.grad is not None
    assert n.grad.tolist() == pytest.approx([0, 1 / 8, 1 / 4, 1 / 4])


def test_a_curve_of_one_point_is_flat() -> None:
    n = counts(1, 100).requires_grad_()
    flat = Curve((8,), (0.5,))(n)
    flat.sum().backward()
    assert flat.tolist() == [0.5, 0.5]
    assert n.grad is not None
    assert n.grad.tolist() == [0, 0]


numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


@given(numbers)
def test_never_falling_never_falls_and_keeps_the_mean(values: list[float]) -> None:
    fitted = never_falling(values)
    assert all(a <= b for a, b in pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values), abs=1e-9)


@given(numbers, numbers)
def test_never_falling_is_the_nearest_such_sequence(values: list[float], other: list[float]) -> None:
    rising = sorted((other * len(values))[: len(values)])

    def distance(to: Any) -> float:
        return sum((a - b) ** 2 for a, b in zip(values, to, strict=True))

    assert distance(never_falling(values)) <= distance(rising) + 1e-9


# -- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call: proportional to the tokens given, one more where the model is pruned."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, int]] = []

    def __call__(self, run: Any, batch: dict[str, Any]) -> float:
        out = run(**batch)
        assert torch.isfinite(out[0]).all()
        pruned = bool(run.plan.stages)
        self.calls.append((pruned, batch["input_ids"].numel()))
        assert bool(batch["attention_mask"].all())
        return batch["input_ids"].numel() / 100 + pruned


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    compiled = measuring.Setup.compiled

    def noting(self: measuring.Setup, model: Any, plan: PrunePlan) -> Any:
        run = compiled(self, model, plan)

        def call(**batch: Any) -> Any:
            return run(**batch)

        call.plan = plan  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(measuring.Setup, "compiled", noting)
    monkeypatch.setattr(measuring, "_seconds", found)
    torch.compiler.reset()
    return found


def test_a_table_has_the_times_of_its_parts(clock: Clock) -> None:
    model = zoo.tiny("bert")
    steps: list[str] = []
    table = LatencyTable.measure(
        model, harness.example(), target="eager", lengths=[8, 24, 50], batch=2, repeats=3, on_step=steps.append
    )
    assert len(steps) == 3 * (3 + 1)
    first = [pruned for pruned, _ in clock.calls[6:]][::6]  # after those that compile: a repeat is three lengths, twice
    assert first in ([False, True, False], [True, False, True])
    n = counts(8, 24, 50)
    whole = sum((table.at(i, n) for i in range(table.num_blocks)), table.rest(n))
    assert whole.tolist() == pytest.approx((n / 100).tolist(), rel=1e-6)  # seconds a row: the batch's over its rows
    assert table.stage(n).tolist() == pytest.approx([0.5] * 3)
    flops = BlockCosts.of(harness.captured("bert"))
    dense = sum((flops.at(i, n) for i in range(4)), flops.rest(n))
    torch.testing.assert_close(table.at(2, n), flops.at(2, n) / dense * n / 100)
    assert (table.conditions.target, table.conditions.batch, table.conditions.dtype) == ("eager", 2, "float64")


def test_the_default_grid_doubles_up_to_what_the_model_takes() -> None:
    assert measuring._grid(None, None, None) == [8, 16, 32, 64, 128, 256, 384, 512]
    assert measuring._grid(None, 700, None) == [8, 16, 32, 64, 128, 256, 384, 512, 700]
    assert measuring._grid(None, None, 100) == [8, 16, 32, 64, 100]
    assert measuring._grid(None, 5, None) == [5]
    assert measuring._grid([30, 7, 7], None, 64) == [7, 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [8, 65]}, "at most 64 tokens; a length of 65"),
        ({"lengths": [0, 8]}, "at least 1"),
        ({"lengths": []}, "at least 1"),
        ({"max_length": 0}, "at least 1"),
        ({"batch": 0}, "at least 1 row"),
        ({"repeats": 0}, "1 repeat"),
        ({"precision": "int8"}, "auto, f32, bf16"),
        ({"precision": "bf16"}, "model's own dtype"),
        ({"target": "openvin"}, "openvino"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match=message) as caught:
        LatencyTable.measure(zoo.tiny("bert"), harness.example(), **{"target": "eager", **options})
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionError)


# -- use and files -----------------------------------------------------------------------------------------------------


def test_a_table_prices_plans_in_seconds() -> None:
    model: CostModel = TABLE
    plan = PrunePlan((Stage(1, 0.5),))  # type: ignore[arg-type]
    assert plan_cost(model, plan, [16]) == pytest.approx(0.001 + 0.02 + 0.004 + 0.01)
    assert plan_share(model, plan, [16]) == pytest.approx(0.035 / 0.051)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    file = TABLE.save(tmp_path / "deep" / "table.json")
    assert LatencyTable.load(file) == TABLE
    assert json.loads(file.read_text())["conditions"]["versions"] == {"torch": "2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a latency table"),
        ({"version": 9}, "format version 9"),
        ({"blocks": [[1.0]]}, "do not fit"),
        ({"lengths": [16, 8]}, "do not fit"),
        ({"blocks": []}, "do not fit"),
        ({"outside": ["many", 1]}, "damaged"),
        ({"conditions": {"model": "Toy"}}, "damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({**TABLE.to_dict(), **change}))
    with pytest.raises(OptionError, match=f"table.json.*{message}"):
        LatencyTable.load(file)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        LatencyTable.load(tmp_path / "none.json")
    file = tmp_path / "table.json"
    file.write_text("{")
    with pytest.raises(OptionError, match="not valid JSON"):
        LatencyTable.load(file)
