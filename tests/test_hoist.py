"""A head that reads one token: the last block computes no more than that token needs, and the answer stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harness
import oracle
import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.cost import FlopCounter
from prunepass.pipeline import PruneResult, prune_graph

PLAN = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm")
LAST = PrunePlan((Stage(2, 0.5), Stage(3, 0.3)), "norm")
TOLERANCE = 1e-12

BATCHES = {
    "right": zoo.batch([13, 9, 4], seed=1),
    "left": zoo.batch([6, 17], seed=2, side="left"),
    "none": zoo.batch([12, 12], seed=3),
    "shortest": zoo.batch([1, 2], seed=4),
}


def both(source: Any, plan: PrunePlan) -> tuple[PruneResult, PruneResult]:
    hoisted, plain = (prune_graph(source.graph_module, plan, metadata=False, hoist=h) for h in (True, False))
    return hoisted, plain


@pytest.mark.parametrize(
    "name",
    ["bert", "deberta-v2"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("distilbert", "modernbert", "albert", "roformer")],
)
@pytest.mark.parametrize("plan", [PLAN, LAST], ids=["early", "last block"])
def test_logits_stay_what_they_were_at_fewer_flops(name: str, plan: PrunePlan) -> None:
    source = harness.captured(name, "sequence")
    hoisted, plain = both(source, plan)
    assert hoisted.changes["hoist"] > 3
    for x in BATCHES.values():
        one, other = (harness.run(r.graph_module, x) for r in (hoisted, plain))
        for a, b in zip(harness.tensors(one).values(), harness.tensors(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
    flops = [FlopCounter(r.graph_module).total(1, 40) for r in (hoisted, plain)]
    assert flops[0] < flops[1]


def test_the_last_attention_has_one_query() -> None:
    hoisted, plain = both(harness.captured("bert", "sequence"), PLAN)
    x = {name: BATCHES["none"][name] for name in ("input_ids", "attention_mask")}
    assert harness.attention_widths(plain.graph_module, x) == [(12, 12), (8, 8), (4, 4), (4, 4)]
    assert harness.attention_widths(hoisted.graph_module, x) == [(12, 12), (8, 8), (4, 4), (1, 4)]


def test_everything_is_left_where_the_head_reads_every_token() -> None:
    hoisted, plain = both(harness.captured("bert", "token"), PLAN)
    assert hoisted.changes["hoist"] == 0
    assert harness.ops(hoisted.graph_module) == harness.ops(plain.graph_module)


class Reads(nn.Module):
    """A BERT that gives chosen slices of its last hidden state."""

    def __init__(self, *slices: Any) -> None:
        super().__init__()
        self.inner = zoo.tiny("bert")
        self.slices = slices

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        state = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return [state[:, at] for at in self.slices]


@pytest.mark.parametrize(
    ("slices", "hoists"),
    [
        ((-1,), True),
        ((slice(0, 1), 0), True),
        ((slice(-2, None),), True),
        ((slice(0, 2),), True),
        ((0, -1), False),
    ],
    ids=["last", "first twice", "last two", "first two", "both ends"],
)
def test_any_end_of_the_row(slices: tuple[Any, ...], hoists: bool) -> None:
    model = Reads(*slices).eval()
    plan = PrunePlan(PLAN.stages, "norm", Protect(first=2, last=2))
    captured = prunepass.graph.capture.capture_module(model, harness.example())
    hoisted, plain = both(captured, plan)
    assert (hoisted.changes["hoist"] > 0) is hoists
    for x in (BATCHES["none"], zoo.batch([3, 3], seed=4)):
        for one, other in zip(*(harness.run(r.graph_module, x) for r in (hoisted, plain)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


DECODERS = [n for n in zoo.SPECIES if zoo.SPECIES[n].causal and zoo.SPECIES[n].model_type != "ctrl"]
#: whose last attention keeps all its queries: scores are spelled out, or rows of a batch lie flat beside it
WHOLE = {"bloom", "gemma2", "gpt2", "opt"}
LOCAL = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm", Protect(first=1, last_share=0.1))


class NextToken(nn.Module):
    """A decoder's logits for the token that comes next, as in the prefill of ``generate()``."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.inner = zoo.tiny(name, "causal", **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        asked = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return self.inner(**asked, logits_to_keep=1).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("padded", [True, False], ids=["mask", "causal kernel"])
@pytest.mark.parametrize("name", zoo.by_day(DECODERS))
def test_the_next_token_needs_one_query_of_the_last_block(name: str, padded: bool) -> None:
    example = harness.example(("input_ids", "attention_mask") if padded else ("input_ids",))
    with oracle.float64_softmax():
        captured = prunepass.graph.capture.capture_module(NextToken(name), example)
    for plan in (LOCAL, PrunePlan(LOCAL.stages, "norm", Protect(last=1))):
        hoisted, plain = both(captured, plan)
        for x in (zoo.batch([12, 12], seed=3), *([zoo.batch([6, 17], seed=2, side="left")] if padded else [])):
            given = {name: x[name] for name in example}
            one, other = (harness.run(r.graph_module, given) for r in (hoisted, plain))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            widths = harness.attention_widths(hoisted.graph_module, given)
            assert widths[:-1] == harness.attention_widths(plain.graph_module, given)[:-1]
            assert (widths[-1][0] == 1) is (name not in WHOLE), widths


def test_static_graphs_of_dynamo_have_it_too() -> None:
    model, x = zoo.tiny("bert", "sequence"), BATCHES["right"]
    inputs = {name: x[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = prunepass.prune(model, PLAN, inputs)(**inputs).logits
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(
                model, backend="tokprune", dynamic=dynamic, options={"plan": PLAN, "target": "eager"}
            )
            torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=0, atol=TOLERANCE)


def test_gradients_are_those_of_the_plain_graph() -> None:
    source = harness.captured("bert", "sequence")
    x = {name: BATCHES["right"][name] for name in ("input_ids", "attention_mask")}
    found = []
    for result in both(source, PLAN):
        parameters = dict(result.graph_module.named_parameters())
        logits = harness.tensors(result.graph_module(**x))["logits"]
        names = [n for n, p in parameters.items() if p.requires_grad]
        grads = torch.autograd.grad(logits.square().sum(), [parameters[n] for n in names], allow_unused=True)
        found.append(dict(zip(names, grads, strict=True)))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        other = found[1][name]
        if grad is None or other is None:
            assert grad is other, name
        else:
            torch.testing.assert_close(grad, other, rtol=0, atol=1e-10)
