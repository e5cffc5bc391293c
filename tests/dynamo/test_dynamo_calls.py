"""No call of what is compiled with "tokprune" runs unpruned without a word, whatever Dynamo makes of it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toys
from prunepass import PrunePlan, Stage
from prunepass.dynamo.backend import compilations, tokprune
from prunepass.errors import RefusalError

PLAN = PrunePlan([Stage(1, 0.5)], "norm")
limits_of_ones_own = pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch.compile takes no limit yet"
)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def few() -> Iterator[None]:
    """Dynamo's limits, low enough to come to them soon."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=2):
        yield


def options(plan: PrunePlan = PLAN, **more: Any) -> dict[str, Any]:
    return {"plan": plan, "target": "eager", **more}


def compiled(model: nn.Module, plan: PrunePlan = PLAN, *, fallback: str = "error", **more: Any) -> Any:
    return torch.compile(model, backend="tokprune", options=options(plan, fallback=fallback), **more)


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def pruned_graphs() -> int:
    return sum(c.result is not None and bool(c.result.sites) for c in compilations())


def plans(count: int) -> list[PrunePlan]:
    return [PrunePlan([Stage(1, f"{i + 1}/{count + 1}")], "norm") for i in range(count)]


class TestLimits:
    @pytest.mark.usefixtures("few")
    def test_every_plan_of_a_sweep_is_pruned(self) -> None:
        model, texts = toys.encoder(layers=2), ids()
        with torch.no_grad():
            found = [compiled(model, plan)(texts) for plan in plans(4)]
        assert pruned_graphs() == 4
        assert len({tuple(one.flatten().tolist()) for one in found}) == 4

    @pytest.mark.usefixtures("few")
    def test_every_kind_of_argument_is_pruned(self) -> None:
        fast = compiled(toys.encoder(layers=2), dynamic=False)
        with torch.no_grad():
            for length in (7, 8, 9, 10):
                fast(ids(2, length))
        assert pruned_graphs() == 4

    @pytest.mark.slow
    def test_twenty_plans_and_twenty_kinds(self) -> None:
        model, texts = toys.encoder(layers=2), ids()
        with torch.no_grad():
            dense = model(texts)
            for i, plan in enumerate(plans(20)):
                assert (compiled(model, plan)(texts) - dense).abs().max() > 1e-6
                assert pruned_graphs() == i + 1
            fast = compiled(model, dynamic=False)
            for length in range(10, 30):
                fast(ids(2, length))
        assert pruned_graphs() == 40

    @pytest.mark.usefixtures("few")
    def test_every_model_of_one_class_is_pruned(self) -> None:
        with torch.no_grad():
            for layers in (2, 3, 4, 5):
                model = toys.encoder(layers=layers)
                model.compile(backend="tokprune", options=options())
                model(ids())
        assert pruned_graphs() == 4

    @pytest.mark.usefixtures("few")
    def test_what_another_backend_has_filled_is_pruned(self) -> None:
        """Dynamo stops asking backends about a function that one of them brought to the limit."""
        model = toys.encoder(layers=2)
        other = torch.compile(model, backend="eager", dynamic=False)
        with torch.no_grad():
            for length in (7, 8, 9):
                other(ids(2, length))
            compiled(model)(ids(2, 9))
        assert pruned_graphs() == 1

    @pytest.mark.usefixtures("few")
    def test_limits_of_other_backends_stay(self) -> None:
        graphs: list[Any] = []
        other = torch.compile(
            toys.encoder(layers=2), backend=lambda gm, _: graphs.append(gm) or gm.forward, dynamic=False
        )
        with torch.no_grad():
            compiled(toys.encoder(layers=3))(ids())
            for length in (7, 8, 9, 10):
                other(ids(2, length))
        assert len(graphs) <= 2
        assert torch._dynamo.config.recompile_limit == 1

    @limits_of_ones_own
    def test_a_limit_of_ones_own_is_refused_at(self) -> None:
        fast = compiled(toys.encoder(layers=2), dynamic=False, recompile_limit=1)
        with torch.no_grad():
            fast(ids(2, 7))
            with pytest.raises(RefusalError, match="as often as it may"):
                fast(ids(2, 8))
            fast(ids(2, 7))
            with pytest.raises(RefusalError, match="as often as it may"):
                fast(ids(2, 9))

    @limits_of_ones_own
    def test_a_limit_with_fallback_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        fast = compiled(toys.encoder(layers=2), fallback="dense", dynamic=False, recompile_limit=1)
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prunepass"):
            for length in (7, 8, 9):
                fast(ids(2, length))
        assert "ran unpruned" in caplog.text
        assert [c.result is None for c in compilations()] == [False, True]


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.encoder(layers=2)
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


class TestWithoutAGraph:
    def test_a_disabled_module_is_refused(self) -> None:
        with torch.no_grad(), pytest.raises(RefusalError, match="Disabled was called and Dynamo made no graph"):
            compiled(Disabled())(ids())

    def test_a_disabled_module_with_fallback_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Disabled()
        fast = compiled(model, fallback="dense")
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prunepass"):
            assert torch.equal(fast(ids()), model(ids()))
            fast(ids())
        assert caplog.text.count("ran unpruned") == 1
        assert "disable" in str(compilations()[-1])

    def test_a_function_that_returns_before_it_computes_is_no_error(self) -> None:
        model = toys.encoder(layers=2)

        def search(texts: Tensor | None) -> Tensor | None:
            return None if texts is None else model(texts)

        fast = torch.compile(search, backend="tokprune", options=options())
        with torch.no_grad():
            assert fast(None) is None
            fast(ids())
        assert pruned_graphs() == 1

    def test_the_users_stance_is_the_users_wish(self) -> None:
        model = toys.encoder(layers=2)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            assert torch.equal(compiled(model)(ids()), model(ids()))

    def test_errors_are_not_suppressed(self) -> None:
        fast = compiled(toys.encoder(toys.Convolution, at=1, layers=3))
        with torch.no_grad(), torch._dynamo.config.patch(suppress_errors=True), pytest.raises(Exception, match="conv"):
            fast(ids())

    def test_an_error_of_the_model_stays_its_own(self) -> None:
        fast = compiled(toys.encoder(layers=2))
        with torch.no_grad(), pytest.raises(Exception, match=r"dtype|Expected tensor|scalar type"):
            fast(ids().double())

    def test_calls_in_calls_count_for_both(self) -> None:
        inner = compiled(toys.encoder(layers=2))

        class Outer(nn.Module):
            @torch.compiler.disable
            def forward(self, texts: Tensor) -> Any:
                return inner(texts)

        with torch.no_grad():
            compiled(Outer())(ids())
        assert pruned_graphs() == 1


class TestWrappedBackends:
    def test_a_partial_is_watched(self) -> None:
        backend = functools.partial(tokprune, options=options())
        with torch.no_grad(), pytest.raises(RefusalError, match="made no graph"):
            torch.compile(Disabled(), backend=backend)(ids())

    def test_a_function_around_it_cannot_be(self, caplog: pytest.LogCaptureFixture) -> None:
        fast = torch.compile(toys.encoder(layers=2), backend=lambda gm, x: tokprune(gm, x, options=options()))
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prunepass"):
            fast(ids())
        assert "cannot be noticed" in caplog.text
