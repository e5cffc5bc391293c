"""A head that reads one token: the last block computes no more than that token needs, and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    ["bert"]
    + [
        pytest.param(n, marks=pytest.mark.slow)
        for n in ("deberta-v2", "distilbert", "modernbert", "albert", "roformer")
    ],
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
        ((slice(0, 2, 2),), False),
        ((slice(-2, None, 2),), False),
        ((0, -1), False),
    ],
    ids=["last", "first twice", "last two", "first two", "first of two", "last but one", "both ends"],
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


DECODERS = [n for n in zoo.SPECIES if zoo.SPECIES[n].causal]
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


def test_queries_can_be_left_as_many_as_keys() -> None:
    captured = prunepass.graph.capture.capture_module(NextToken("llama"), harness.example(("input_ids",)))
    x = {"input_ids": zoo.batch([12], seed=3)["input_ids"]}
    found = [prune_graph(captured.graph_module, LOCAL, metadata=False, fewer_queries=f) for f in (True, False)]
    assert [harness.attention_widths(r.graph_module, x)[-1] for r in found] == [(1, 4), (4, 4)]
    assert found[1].changes["hoist"] > 3  # what comes after the attention
    one, other = (harness.run(r.graph_module, x) for r in found)
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


class Headed(nn.Module):
    """A decoder whose last state goes through ``work`` before its last token is read."""

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = zoo.tiny("llama")
        self.work = work

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.work(self.inner(input_ids=input_ids, use_cache=False).last_hidden_state)[:, -1]


def over_slots(x: Tensor, causal: bool) -> Tensor:
    """Attention within each token, whose queries are not tokens."""
    h = x.unflatten(-1, (4, -1))
    attend = nn.functional.scaled_dot_product_attention
    return attend(h.tanh(), h * 1.5, h.sin(), is_causal=causal).mean(2, keepdim=True)


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * b.sigmoid(), a.amax(-1, keepdim=True) + b.softmax(-1)], dim=-1)


def half_read(x: Tensor) -> Tensor:
    """One piece is read at its last token, the other everywhere."""
    a, b = x.chunk(2, dim=-1)
    return a.tanh() + b.amax(dim=1, keepdim=True)


def checked(x: Tensor) -> Tensor:
    torch.ops.aten._assert_tensor_metadata.default(x, dtype=x.dtype)
    return x * x.square().mean(-1, keepdim=True).rsqrt()


@pytest.mark.parametrize(
    ("work", "hoists"),
    [
        (partial(over_slots, causal=False), False),
        (partial(over_slots, causal=True), False),
        (gated, True),
        (checked, True),
    ],
    ids=["slots", "causal slots", "gated", "checked"],
)
def test_heads_of_ones_own(work: Callable[[Tensor], Tensor], hoists: bool) -> None:
    captured = prunepass.graph.capture.capture_module(Headed(work).eval(), harness.example(("input_ids",)))
    hoisted, plain = both(captured, LOCAL)
    for length in (1, 2, 12):
        x = {"input_ids": zoo.batch([length, length], seed=5)["input_ids"]}
        one, other = (harness.run(r.graph_module, x) for r in (hoisted, plain))
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert (harness.attention_widths(hoisted.graph_module, x)[zoo.LAYERS - 1] == (1, 4)) is hoists


def test_a_head_that_looks_at_all_tokens_is_given_them() -> None:
    captured = prunepass.graph.capture.capture_module(Headed(half_read).eval(), harness.example(("input_ids",)))
    hoisted, plain = both(captured, LOCAL)
    assert hoisted.changes["hoist"] == 0
    assert harness.ops(hoisted.graph_module) == harness.ops(plain.graph_module)


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
