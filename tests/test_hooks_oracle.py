"""The second reference: the unpruned `transformers` model, masked by module hooks that know nothing of graphs.

`oracle.run_masked` computes scores from eager attention, selects in plain Python and hides keys in each later layer. A
pruned graph must agree with it at every live position: at kept tokens, and at pruned ones with the state they rest at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import oracle
import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage

TOLERANCE = 1e-10

PLANS: dict[str, PrunePlan] = {
    "attention before blocks": PrunePlan((Stage(1, 0.7), Stage(2, "1/2"), Stage(3, "1/3"))),
    "attention inside blocks": PrunePlan((Stage(0, 0.8, after_attention=True), Stage(2, 0.4, after_attention=True))),
    "norm from the start": PrunePlan((Stage(0, 0.8), Stage(1, 0.6, after_attention=True), Stage(3, 0.2)), "norm"),
    "protected": PrunePlan(
        (Stage(1, 0.5), Stage(2, 0.1, "norm")), protect=Protect(first=2, last=1, last_share=0.1, token_ids=(10, 20, 30))
    ),
    "two scorers, one place each side": PrunePlan((Stage(2, 0.6, "norm"), Stage(2, 0.5, after_attention=True))),
}


CENTRAL = ("bert", "llama", "gpt2")
FOR_ALL = ("attention inside blocks",)


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def batches() -> dict[str, dict[str, Tensor]]:
    return {
        "right": zoo.batch([13, 9, 4], seed=1, high=40),
        "left": zoo.batch([6, 17], seed=2, side="left", high=40),
        "none": zoo.batch([12, 12], seed=3, high=40),
        "one": zoo.batch([21], seed=4, high=40),
    }


@cache
def eager(name: str) -> Any:
    return zoo.tiny(name, attention="eager")


@pytest.mark.parametrize("name", oracle.ANATOMY)
def test_the_reference_without_stages_is_the_model(name: str) -> None:
    for kind, x in batches().items():
        plain = harness.run(zoo.tiny(name), x)[0]
        masked = oracle.run_masked(eager(name), oracle.ANATOMY[name], PrunePlan(()), x).output[0]
        live = x["attention_mask"].bool()
        assert float((plain - masked)[live].abs().max()) < TOLERANCE, kind


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(name, label, marks=() if name in CENTRAL or label in FOR_ALL else pytest.mark.slow)
        for name in oracle.ANATOMY
        for label in PLANS
    ],
)
def test_pruned_graphs_agree_with_hooks(name: str, label: str) -> None:
    plan = PLANS[label]
    gathered = harness.pruned(harness.captured(name), plan).graph_module
    for kind, x in batches().items():
        live = x["attention_mask"].bool()
        expected = oracle.run_masked(eager(name), oracle.ANATOMY[name], plan, x)
        found = harness.run(gathered, x)
        gap = (found.last_hidden_state - expected.output[0])[live].abs().max()
        assert float(gap) < TOLERANCE, kind
        if "pooler_output" in found and live[:, 0].all():  # the pooler reads slot 0, where left padding stands
            assert float((found.pooler_output - expected.output.pooler_output).abs().max()) < TOLERANCE, kind


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("label", ["attention inside blocks", "protected"])
def test_kept_tokens_are_those_of_the_reference(name: str, label: str) -> None:
    from prunepass.pipeline import kept_tokens

    plan = PLANS[label]
    for kind in ("right", "left"):
        x = batches()[kind]
        expected = oracle.run_masked(eager(name), oracle.ANATOMY[name], plan, x).alive
        found = kept_tokens(zoo.tiny(name), plan, x)
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one, two), kind


def test_a_head_over_restored_states() -> None:
    """Token classification reads pruned positions too: they rest at the state they were pruned with."""
    plan = PLANS["attention inside blocks"]
    model = zoo.tiny("bert", "token")
    gathered = prunepass.prune(model, plan, harness.example())
    base = zoo.tiny("bert", "token", attention="eager")
    for x in batches().values():
        states = oracle.run_masked(base.bert, oracle.ANATOMY["bert"], plan, x).output[0]
        live = x["attention_mask"].bool()
        with torch.no_grad():
            expected = base.classifier(states)
            assert float((gathered(**x).logits - expected)[live].abs().max()) < TOLERANCE


def test_a_decoders_logits_over_restored_states() -> None:
    plan = PLANS["protected"]
    gathered = prunepass.prune(zoo.tiny("llama", "causal"), plan, harness.example())
    base = zoo.tiny("llama", "causal", attention="eager")
    for x in batches().values():
        states = oracle.run_masked(base.model, oracle.ANATOMY["llama"], plan, x).output[0]
        live = x["attention_mask"].bool()
        with torch.no_grad():
            assert float((gathered(**x).logits - base.lm_head(states))[live].abs().max()) < TOLERANCE
