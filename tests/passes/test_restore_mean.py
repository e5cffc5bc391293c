"""`restore="mean"`: pruned positions carry the mean of the tokens kept to the end, and so does a mean over the row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtimes import CONFIG, OFFLINE, assert_same, bert, text
from torch import Tensor

import harness
import oracle
import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.dynamo.backend import Options, tokprune
from prunepass.errors import OptionError, PlanError
from prunepass.passes.restore import restore_faded, restore_gathered, restore_masked
from prunepass.plan.choice import choose

PLAN = PrunePlan((Stage(1, 0.7), Stage(2, 0.4)), restore="mean", protect=Protect(first=1))


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def batches() -> list[dict[str, Tensor]]:
    return [
        zoo.batch([13, 9, 4], seed=1, high=40),
        zoo.batch([6, 17], seed=2, side="left", high=40),
        zoo.batch([21], seed=4, high=40),
        zoo.batch([1], seed=5, high=40),
    ]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_pruned_positions_carry_the_mean_of_the_kept(name: str, mode: str) -> None:
    pruned = harness.pruned(harness.captured(name), PLAN, mode).graph_module
    reference = zoo.tiny(name, attention="eager")
    for x in batches():
        expected = oracle.run_masked(reference, oracle.ANATOMY[name], PLAN, x)
        states, kept, live = expected.output[0], expected.alive[-1], x["attention_mask"].bool()
        found = pruned(**x)[0]
        for row in range(len(kept)):
            mean = states[row, kept[row]].mean(0)
            torch.testing.assert_close(found[row, kept[row]], states[row, kept[row]], rtol=0, atol=1e-10)
            gone = live[row] & ~kept[row]
            torch.testing.assert_close(found[row, gone], mean.expand(int(gone.sum()), -1), rtol=0, atol=1e-10)
            torch.testing.assert_close(found[row, live[row]].mean(0), mean, rtol=0, atol=1e-10)


def test_a_row_without_live_tokens_gets_zeros_and_no_nan() -> None:
    states = torch.full((2, 3, 4), torch.nan)
    states[0] = 1.0
    alive = torch.tensor([[True, True, False], [False, False, False]])
    positions = torch.arange(3).expand(2, 3)
    gathered = restore_gathered([states, states], [positions], alive, alive, "mean")
    assert gathered[0].eq(1).all()
    assert gathered[1].eq(0).all()
    torch.testing.assert_close(restore_masked([states, states], [alive], "mean"), gathered)


def test_degrees_weigh_the_mean() -> None:
    last, degree = torch.randn(1, 4, 3), torch.tensor([[1.0, 0.5, 0.0, 0.5]])
    found = restore_faded([last, last], [degree], "mean")
    mean = (last[0] * degree[0, :, None]).sum(0) / 2
    torch.testing.assert_close(found[0, 2], mean)
    torch.testing.assert_close(found[0, 1], (last[0, 1] + mean) / 2)


def test_a_mean_in_half_precision_does_not_overflow() -> None:
    states = torch.full((1, 3000, 2), 1000.0, dtype=torch.float16)
    positions, alive = torch.arange(3000)[None], torch.ones(1, 3000, dtype=torch.bool)
    found = restore_gathered([states, states[:, :2900]], [positions[:, :2900]], alive, alive[:, :2900], "mean")
    torch.testing.assert_close(found, states)


class TestTargets:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        tokprune.reset()  # type: ignore[attr-defined]
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("target", OFFLINE)
    def test_they_agree(self, target: str) -> None:
        model = bert()
        options = {
            "keep": [0.7, 0.4],
            "layers": [1, 2],
            "restore": "mean",
            "target": target,
            "config": CONFIG.get(target, {}),
        }
        fast = torch.compile(model, backend="tokprune", options=options)
        reference = prunepass.prune(model, PLAN, text(2, 9))
        with torch.no_grad():
            for x in (text(2, 9), text(3, 21)):
                assert_same(fast(**x), reference(**x))


def planned(options: dict[str, Any]) -> Any:
    """The plan that torch.compile would take."""
    settings = Options.parse(options)
    return choose(settings.plan, None, settings.short).plan


class TestOption:
    def test_restore_goes_into_the_short_form(self) -> None:
        short = {"keep": [0.7, 0.4], "layers": [1, 2], "protect": {"first": 1}, "restore": "mean"}
        assert planned(short) == PLAN

    def test_a_plan_says_it_itself(self) -> None:
        with pytest.raises(OptionError, match="both a plan and restore"):
            Options.parse({"plan": PLAN, "restore": "mean"})

    def test_another_word(self) -> None:
        with pytest.raises(PlanError, match="last, lens, mean, zeros"):
            planned({"keep": 0.5, "layers": [1], "restore": "average"})


class Pooling(torch.nn.Module):
    """Mean pooling inside the model, with padding left out."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_pool_inside_the_model_is_the_mean_of_the_kept(name: str) -> None:
    pruned = prunepass.prune(Pooling(zoo.tiny(name)), PLAN, harness.example())
    reference = zoo.tiny(name, attention="eager")
    x = batches()[0]
    expected = oracle.run_masked(reference, oracle.ANATOMY[name], PLAN, x)
    for row, kept in enumerate(expected.alive[-1]):
        mean = expected.output[0][row, kept].mean(0)
        torch.testing.assert_close(pruned(**x)[row], mean, rtol=0, atol=1e-10)
