"""Lenses: the regression that fits them, and the outputs that plans restore by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
import prunepass
import zoo
from prunepass import PrunePlan, Stage
from prunepass.cost.blocks import BlockCosts
from prunepass.errors import PlanError, WeightsError
from prunepass.pipeline import prune_graph
from prunepass.scorers.lens import Lens, Moments

D = zoo.HIDDEN
STAGES = (Stage(1, 0.6), Stage(3, 0.3))


def lens_weights(count: int = 2, rank: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {f"stages.{i}.lens.{k}": v for i in range(count) for k, v in Lens(D, rank).state_dict().items()}


def plan(restore: str = "lens") -> PrunePlan:
    return PrunePlan(STAGES, "norm", restore=restore, weights=lens_weights())


def apply(lens: Lens, x: Tensor) -> Tensor:
    with torch.no_grad():
        return lens.double()(x)


class TestRegression:
    def data(self, width: int = 12, tokens: int = 400) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        early = torch.randn(tokens, width, generator=g, dtype=torch.float64) + 3
        late = early @ torch.randn(width, width, generator=g, dtype=torch.float64) - 5
        return early, late + torch.randn(tokens, width, generator=g, dtype=torch.float64)

    def test_an_affine_map_of_low_rank_is_found_again(self) -> None:
        early, _ = self.data()
        true = Lens(12, 3).double()
        with torch.no_grad():
            late = true(early)
        moments = Moments(12)
        for part in (slice(0, 150), slice(150, 400)):
            moments.add(early[part], late[part])
        torch.testing.assert_close(apply(moments.lens(3), early), late, rtol=0, atol=2e-2)

    def test_the_full_rank_is_least_squares(self) -> None:
        early, late = self.data()
        moments = Moments(12)
        moments.add(early, late)
        ones = torch.ones(len(early), 1, dtype=torch.float64)
        wide = torch.cat([early, ones], dim=1)
        wanted = wide @ torch.linalg.lstsq(wide, late).solution
        torch.testing.assert_close(apply(moments.lens(99), early), wanted, rtol=0, atol=5e-2)

    def test_a_lower_rank_errs_more_but_less_than_any_other_of_its_rank(self) -> None:
        early, late = self.data()
        moments = Moments(12)
        moments.add(early, late)
        errors = [float((apply(moments.lens(r), early) - late).square().mean()) for r in (1, 3, 6, 12)]
        assert errors == sorted(errors, reverse=True)
        best = moments.lens(3)
        for seed in range(5):  # no direction leads down from the solution
            torch.manual_seed(seed)
            other = moments.lens(3)
            with torch.no_grad():
                other.down.weight += 0.02 * torch.randn_like(other.down.weight)
                other.up.weight += 0.02 * torch.randn_like(other.up.weight)
            assert (apply(other, early) - late).square().mean() > (apply(best, early) - late).square().mean()

    def test_features_that_never_vary_are_no_harm(self) -> None:
        early, late = self.data()
        early[:, 4], late[:, 2] = 1.0, 0.0
        moments = Moments(12)
        moments.add(early, late)
        found = apply(moments.lens(12), early)
        assert found.isfinite().all()
        assert found[:, 2].abs().max() < 1e-3


@pytest.mark.parametrize(
    "name", ["bert", "llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("modernbert", "gpt_neox"))]
)
def test_gathered_and_hidden_are_one_and_padding_changes_nothing(name: str) -> None:
    source = harness.captured(name)
    batches = [zoo.batch([13, 9, 4], seed=1), zoo.batch([6, 17], seed=2, side="left"), zoo.batch([12, 12], seed=3)]
    # one graph at a time owns the scorers' weights in the dtype of its model
    gathered, masked = (harness.pruned(source, plan(), mode).graph_module for mode in ("gather", "mask"))
    for x in batches:
        one, other = harness.run(gathered, x), harness.run(masked, x)
        assert harness.difference(one, other, x["attention_mask"].bool()) < 1e-10


def test_kept_tokens_have_their_states_and_others_their_lenses_word() -> None:
    x = zoo.batch([13, 9], seed=5)
    model = zoo.tiny("bert")
    with torch.no_grad():
        last = prunepass.prune(model, plan("last"), x)(**x).last_hidden_state
        seen = prunepass.prune(model, plan("lens"), x)(**x).last_hidden_state
    first, second = prunepass.pipeline.kept_tokens(model, plan("last"), x)
    live = x["attention_mask"].bool()
    lenses = [Lens.load(plan().lens_of(i), D, "").double() for i in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(seen[second], last[second], rtol=0, atol=1e-12)
        for gone, lens in ((live & ~first, lenses[0]), (first & ~second, lenses[1])):
            assert gone.any()
            torch.testing.assert_close(seen[gone], lens(last[gone]), rtol=0, atol=1e-10)


def test_other_hidden_states_are_restored_as_they_were() -> None:
    x = zoo.batch([13, 9], seed=5)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.tiny("bert")

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)

    with torch.no_grad():
        one, other = (prunepass.prune(Both().eval(), plan(r), x)(**x).hidden_states for r in ("lens", "last"))
    live = x["attention_mask"].bool()
    for a, b in zip(one[:-1], other[:-1], strict=True):
        torch.testing.assert_close(a[live], b[live], rtol=0, atol=1e-12)
    assert (one[-1] - other[-1])[live].abs().max() > 1e-3


def test_a_static_graph_of_dynamo_and_gradients() -> None:
    x = zoo.batch([13, 9], seed=5)
    model = zoo.tiny("bert")
    compiled = torch.compile(model, backend="tokprune", options={"plan": plan(), "target": "eager"})
    with torch.no_grad():
        wanted = prunepass.prune(model, plan(), x)(**x).last_hidden_state
        found = compiled(**x).last_hidden_state
    live = x["attention_mask"].bool()
    torch.testing.assert_close(found[live], wanted[live], rtol=0, atol=1e-10)


def test_a_head_that_reads_the_first_token_needs_no_lens() -> None:
    x = zoo.batch([13, 9], seed=5)
    model = zoo.tiny("bert", "sequence")
    with torch.no_grad():
        bare, full = (
            prunepass.prune(model, p, x)(**x).logits for p in (PrunePlan(STAGES, "norm", restore="lens"), plan())
        )
    torch.testing.assert_close(bare, full, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "needs trained weights"),
        ({k: v for k, v in lens_weights().items() if "up.bias" not in k}, "needs trained weights"),
        ({k: v.T if "down" in k else v for k, v in lens_weights().items()}, "do not fit together"),
        ({k: v[:, :-1] if "down" in k else v[:-1] for k, v in lens_weights().items()}, f"are {D} wide"),
        ({k: v[:-1] if "bias" in k else v for k, v in lens_weights().items()}, "damaged"),
    ],
    ids=["none", "one missing", "transposed", "narrow", "bias"],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, Tensor], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        harness.pruned(harness.captured("bert"), PrunePlan(STAGES, "norm", restore="lens", weights=weights))


def test_a_plan_travels_with_its_lenses(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    back = PrunePlan.from_pretrained(tmp_path)
    assert back == plan()
    assert set(back.lens_of(1)) == {"down.weight", "up.weight", "up.bias"}
    assert back.weights_of(1) == {}
    assert replace(back, restore="zeros") != back  # and can be restored otherwise without them
    with pytest.raises(PlanError, match="restore must be one of"):
        replace(back, restore="lenses")


def test_costs_count_the_lens() -> None:
    source = harness.captured("bert")
    bare, with_lens = (BlockCosts.of(source, scorer="norm", lens=rank) for rank in (0, 5))
    n = torch.tensor(20.0, dtype=torch.float64)
    assert with_lens.stage(n) - bare.stage(n) == 4 * D * 5 * 20
    counter = prunepass.cost.FlopCounter
    dense, lens = (counter(prune_graph(source.graph_module, plan(r)).graph_module) for r in ("last", "lens"))
    more = lens.total(1, 20) - dense.total(1, 20)
    assert more == 4 * D * 5 * (20 + 12)  # of the tokens that reach the two stages
