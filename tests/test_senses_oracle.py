"""Models that see or hear, pruned from their own inputs: the unmodified model with pruned tokens hidden by module hooks
gives the same outputs, to 1e-10 in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

import harness
import hooks
import oracle
import senses
from prunepass import Protect, PrunePlan, Stage
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import prune_graph

TOLERANCE = 1e-10
PLAN = PrunePlan((Stage(1, "1/2"), Stage(3, 0.3)), "norm")
OTHERS = {
    "from the first block": PrunePlan((Stage(0, 0.7), Stage(2, "1/4")), "norm"),
    "protected at both ends": PrunePlan((Stage(2, 0.2),), "norm", protect=Protect(first=7, last=2)),
}
EVERY_DAY = ("vit", "deit", "beit", "dinov2-registers", "siglip", "wav2vec2", "ast")


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


@cache
def captured(name: str) -> Captured:
    return capture_module(senses.tiny(name), senses.example(name))


def expected(name: str, plan: PrunePlan, x: dict[str, Any]) -> Any:
    model = senses.tiny(name)
    layers = hooks.layers_of(model, senses.LAYERS)
    return hooks.run_hooked(model, layers, plan, x, live=senses.live(name, x)).output


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERY_DAY else pytest.mark.slow) for n in senses.SENSES]
)
def test_a_first_plan_agrees_with_hooks(name: str) -> None:
    result = prune_graph(captured(name).graph_module, PLAN, metadata=False)
    sense = senses.SENSES[name]
    assert result.plan.protect.first == max(1, sense.prefix), "class and register tokens stay"
    for x in (senses.example(name, 2), senses.example(name, 3, seed=1)):
        found, wanted = harness.run(result.graph_module, x), expected(name, result.plan, x)
        live = senses.live(name, x)
        assert harness.difference(found, wanted, live) < TOLERANCE
    widths = harness.attention_widths(result.graph_module, x)
    counts = [oracle.count(sense.tokens, stage.keep, result.plan.protect) for stage in result.plan.stages]
    assert [keys for _, keys in widths][:4] == [sense.tokens, counts[0], counts[0], counts[1]]


@pytest.mark.parametrize("label", OTHERS)
@pytest.mark.parametrize("name", ["deit", pytest.param("wav2vec2", marks=pytest.mark.slow)])
def test_other_plans_agree_with_hooks(name: str, label: str) -> None:
    result = prune_graph(captured(name).graph_module, OTHERS[label], metadata=False)
    x = senses.example(name, 3, seed=2)
    found, wanted = harness.run(result.graph_module, x), expected(name, result.plan, x)
    assert harness.difference(found, wanted, senses.live(name, x)) < TOLERANCE


@pytest.mark.parametrize("name", ["beit", "wav2vec2", pytest.param("dinov3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scorer", ["norm", pytest.param("attention", marks=pytest.mark.slow)])
def test_merging_is_the_same_by_gathering_and_by_masking(name: str, scorer: str) -> None:
    plan = PrunePlan((Stage(1, "1/2", leave="merge"), Stage(3, 0.3, leave="merge")), scorer)
    x = senses.example(name)
    one, two = (
        harness.run(prune_graph(captured(name).graph_module, plan, mode=mode, metadata=False).graph_module, x)
        for mode in ("gather", "mask")
    )
    assert harness.difference(one, two, senses.live(name, x)) < TOLERANCE


@pytest.mark.parametrize("name", ["wav2vec2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hubert", "wavlm"))])
def test_a_sound_may_have_any_length_and_padding_changes_nothing(name: str) -> None:
    result = prune_graph(captured(name).graph_module, PLAN, metadata=False)
    for samples in (400, 330, 77):
        x = senses.example(name, 3, seed=samples)
        x = {k: v[:, :samples].contiguous() for k, v in x.items()}
        found, live = harness.run(result.graph_module, x), senses.live(name, x)
        assert harness.difference(found, expected(name, result.plan, x), live) < TOLERANCE
        for row, mask in enumerate(x["attention_mask"].bool()):
            alone = harness.run(result.graph_module, {k: v[row : row + 1, mask] for k, v in x.items()})
            here = live[row]
            gap = alone.last_hidden_state[0] - found.last_hidden_state[row, here]
            assert float(gap.abs().max()) < TOLERANCE


def test_all_doors_merge_alike() -> None:
    """Whether attention looks back, which decides what may be merged, is read off masks for one number of tokens."""
    import torch

    plan = PrunePlan((Stage(1, "1/2", leave="merge"),), "norm")
    model, x = senses.tiny("vit"), senses.example("vit")
    torch._dynamo.reset()
    options = {"plan": plan, "target": "eager"}
    found = harness.run(torch.compile(model, backend="tokprune", options=options), x)
    wanted = harness.run(prune_graph(captured("vit").graph_module, plan, metadata=False).graph_module, x)
    assert harness.difference(found, wanted, senses.live("vit", x)) < TOLERANCE


def test_counts_of_an_image_are_constants_in_the_graph() -> None:
    graph = prune_graph(captured("vit").graph_module, PLAN, metadata=False).graph_module.graph
    widths = [node.args[1] for node in graph.nodes if str(node.target) == "aten.topk.default"]
    assert set(widths) == {19, 12}, widths
    reads = {n.args[1] for n in graph.nodes if str(n.target) == "aten.sym_size.int"}
    assert reads == {0}, "sizes but the batch are numbers"


def test_a_pyramid_of_features_has_every_patch() -> None:
    """A backbone takes the stream out of its middle, and lays it out as an image: restored there, and at the end."""
    from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model

    options = senses.IMAGES["dinov2"].options
    config = Dinov2Config(**options, out_features=["stage2", "stage4"])
    model = senses.zoo.randomize(Dinov2Backbone(config).double().eval())
    x = senses.example("dinov2")
    result = prune_graph(capture_module(model, x).graph_module, PLAN, metadata=False)
    found = harness.run(result.graph_module, x).feature_maps
    for features, depth in zip(found, (2, 4), strict=True):  # as deep a model ends in the same states
        whole = Dinov2Model(Dinov2Config(**options | {"num_hidden_layers": depth})).double().eval()
        whole.load_state_dict(model.state_dict(), strict=False)
        plan = PrunePlan([stage for stage in PLAN.stages if stage.layer < depth], "norm")
        layers = hooks.layers_of(whole, depth)
        states = hooks.run_hooked(whole, layers, plan, x, live=senses.live("dinov2", x)).output.last_hidden_state
        wanted = states[:, 1:].transpose(1, 2).reshape(2, 32, 6, 6)
        assert float((features - wanted).abs().max()) < TOLERANCE
