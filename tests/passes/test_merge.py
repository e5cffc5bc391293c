"""Stages that merge: the function, the graphs against hooks, rows in batches, gradients, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import merging
import pytest
import runtimes
import torch

import harness
import hooks
import oracle
import prunepass
import senses
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PlanError
from prunepass.passes.merge import _first_best, merge, restore_hosted
from prunepass.passes.weigh import weigh_in_mask, weigh_in_scores

SEVERAL = PrunePlan(
    (Stage(1, 0.7, leave="merge"), Stage(2, 0.5), Stage(3, 0.3, leave="merge")), "norm", Protect(first=1, last=1)
)
OPEN_END = PrunePlan((Stage(0, 0.6, leave="merge"), Stage(2, 0.3, leave="merge")), "norm", Protect(first=0))
PLANS = {"several": SEVERAL, "open end": OPEN_END}
MODELS = (
    "bert",
    "roberta",
    "electra",
    "albert",
    "mpnet",
    "distilbert",
    "deberta-v2",
    "modernbert",
    "gpt2",
    "bloom",
    "gpt_neox",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
)
EVERY_DAY = {("bert", "several"), ("llama", "several"), ("modernbert", "open end"), ("bloom", "open end")}


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def batches() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "right": zoo.batch([13, 9, 4], seed=1, high=40),
        "left": zoo.batch([6, 17], seed=2, side="left", high=40),
        "one": zoo.batch([21], seed=4, high=40),
    }


def test_a_mean_by_size() -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [0.1, 4.0]]], dtype=torch.float64)
    sizes = torch.tensor([[1.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    out, total, host = merge(states, torch.tensor([[0, 3]]), sizes)
    assert total.tolist() == [[3.0, 4.0]]
    assert host.tolist() == [[0, 1, 0, 1]]
    expected = torch.stack([(states[0, 0] + 2 * states[0, 2]) / 3, (3 * states[0, 1] + states[0, 3]) / 4])
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-15)
    later = merge(states, torch.tensor([[0, 1]]), sizes, later_only=True)
    assert later[2].tolist() == [[0, 1, -1, -1]], "nothing that stays stands behind the last two"
    assert later[1].tolist() == [[1.0, 3.0]]


def test_a_protected_token_is_no_host() -> None:
    states = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.05]]])
    protected = torch.tensor([[2, 0, 0, 0]])
    assert merge(states, torch.tensor([[0, 1, 2]]), None, protected=protected)[2].tolist() == [[0, 1, 2, 1]]
    assert merge(states, torch.tensor([[0]]), None, protected=protected)[2].tolist() == [[0, -1, -1, -1]]


def test_keys_draw_attention_by_what_they_stand_for() -> None:
    """A row whose tokens repeat each other comes out as the row with the repetitions left in."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 3))
    sizes = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    many = key.repeat_interleave(torch.tensor([1, 3, 2]), dim=2)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, many, many)
    hidden = torch.tensor([[[[True, True, True]]]])
    for mask in (None, hidden, torch.zeros(1, 1, 1, 3, dtype=torch.float64)):
        found = attend(query, key, key, weigh_in_mask(query, sizes, mask, is_causal=False))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    scores = query @ key.transpose(2, 3) / 2
    torch.testing.assert_close(weigh_in_scores(scores, sizes).softmax(-1) @ key, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kept", [1, 6, 10])
@pytest.mark.parametrize("told", ["nothing", "sizes", "protected", "levels", "vectors", "later", "all"])
def test_taking_out_what_leaves_first_changes_nothing(kept: int, told: str) -> None:
    """Where T and K are constants. Against the form that compares with all slots."""
    generator = torch.Generator().manual_seed(kept)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = random(3, 11, 5)
    states[:, 4] = states[:, 2]  # at equal cosine
    index = torch.stack([torch.randperm(11, generator=generator)[:kept].sort().values for _ in range(3)])
    given: dict[str, Any] = {
        "sizes": random(3, 11).abs() + 1,
        "protected": (random(3, 11) > 0.5).long(),
        "levels": torch.arange(11).expand(3, 11) % 2,
        "vectors": random(3, 11, 2),
        "later": True,
    }
    given = given if told == "all" else {k: v for k, v in given.items() if k == told}
    given["later_only"] = given.pop("later", False)
    sizes = given.pop("sizes", None)
    whole = merge(states, index, sizes, **given)
    for found, expected in zip(merge(states, index, sizes, gone=11 - kept, **given), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_hosts_at_equal_cosine_and_dead_slots() -> None:
    states = torch.ones(1, 5, 3)
    states[0, 4] = torch.nan
    alive = torch.tensor([[True, True, True, True, False]])
    out, total, host = merge(states, torch.tensor([[1, 3]]), None, alive)
    assert host.tolist() == [[0, 0, 0, 1, -1]]
    assert total.tolist() == [[3.0, 1.0]]
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_of_no_numbers_keeps_to_itself(fixed: bool) -> None:
    """A broken image: its tokens have hosts of its own, so that nothing is looked up in other rows or beyond them."""
    states = torch.randn(3, 5, 3)
    index = torch.tensor([[1, 3]]).expand(3, 2)
    given = {"gone": 3} if fixed else {}
    wanted = merge(states, index, None, **given)
    states[1] = torch.nan
    out, total, host = merge(states, index, None, **given)
    assert bool(out[1].isnan().any())
    assert (int(host.min()), int(host.max())) == (0, 1)
    for found, expected in zip((out, total, host), wanted, strict=True):
        assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_choose_between_equal_states(dtype: torch.dtype) -> None:
    """A matrix product may give equal rows with other last digits."""
    above = 1 + 4 * torch.finfo(dtype).eps
    cosine = torch.tensor([[[0.3, 0.5, -2.0], [0.3 * above, 0.4, -2.0], [0.2, 0.5 * above, -2.0]]], dtype=dtype)
    assert _first_best(cosine)[0].int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_the_state_of_the_host_comes_back() -> None:
    states = [torch.full((1, 4, 1), 0.0), torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[5.0]]])]
    hosts = [torch.tensor([[0, 1, 0, -1]]), torch.tensor([[-1, 0]])]
    assert restore_hosted(states, hosts).flatten().tolist() == [1.0, 5.0, 1.0, 0.0]
    hosts = [torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0]])]
    assert restore_hosted(states, hosts).flatten().tolist() == [5.0] * 4
    assert restore_hosted(states, hosts, complete=True).flatten().tolist() == [5.0] * 4


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(name, label, marks=() if (name, label) in EVERY_DAY else pytest.mark.slow)
        for name in MODELS
        for label in PLANS
    ],
)
def test_graphs_agree_with_hooks(name: str, label: str) -> None:
    plan, model = PLANS[label], zoo.tiny(name)
    graphs = [harness.pruned(harness.captured(name), plan, mode).graph_module for mode in ("gather", "mask")]
    layers = hooks.layers_of(model, zoo.LAYERS)
    for kind, x in batches().items():
        expected = merging.run_merged(model, layers, plan, x, zoo.SPECIES[name].causal).output[0]
        for graph in graphs:
            gap = (harness.run(graph, x)[0] - expected)[x["attention_mask"].bool()].abs().max()
            assert float(gap) < 1e-10, kind


def test_merging_is_not_dropping() -> None:
    dropped = PrunePlan(tuple(Stage(s.layer, s.keep) for s in SEVERAL.stages), "norm", SEVERAL.protect)
    x = batches()["right"]
    one, two = (harness.run(harness.pruned(harness.captured("bert"), p).graph_module, x) for p in (SEVERAL, dropped))
    assert harness.difference(one, two, x["attention_mask"].bool()) > 1e-2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_row_alone_is_the_row_in_its_batch(name: str) -> None:
    """On the left only for Llama: BERT's positions count from the first slot, and Llama's rotations are float32's."""
    graph = harness.pruned(harness.captured(name), SEVERAL).graph_module
    for kind in ("right", "left") if name == "llama" else ("right",):
        x = batches()[kind]
        together = harness.run(graph, x)[0]
        for b, live in enumerate(x["attention_mask"].bool()):
            alone = harness.run(graph, {k: v[b : b + 1, live] for k, v in x.items()})[0]
            assert float((alone[0] - together[b, live]).abs().max()) < (1e-5 if kind == "left" else 1e-10), kind


def test_gradients_flow_through_both_forms() -> None:
    x = batches()["right"]
    live = x["attention_mask"].bool()
    grads = []
    for mode in ("gather", "mask"):
        graph = harness.pruned(harness.captured("bert"), SEVERAL, mode).graph_module
        weights = [p for n, p in graph.named_parameters() if "word_embeddings" in n or "layer.0" in n]
        grads.append(torch.autograd.grad((graph(**x)[0][live] ** 2).sum(), weights))
    for one, two in zip(*grads, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
    assert max(float(g.abs().max()) for g in grads[0]) > 1e-3


def test_plans_say_it() -> None:
    plan = PrunePlan((Stage(1, 0.5, leave="merge"), Stage(2, 0.25)))
    assert PrunePlan.from_json(plan.to_json()) == plan
    assert [s.get("leave") for s in plan.to_dict()["stages"]] == ["merge", None]
    assert "leave='merge'" in repr(plan)
    with pytest.raises(PlanError, match="drop, merge"):
        Stage(1, 0.5, leave="fold")  # type: ignore[arg-type]  # the point
    with pytest.raises(PlanError, match="lens"):
        PrunePlan((Stage(1, 0.5, leave="merge"),), restore="lens")


def test_images_are_merged_by_default() -> None:
    plan = prunepass.prune(senses.tiny("vit"), "default", senses.example("vit")).plan
    assert {stage.leave for stage in plan.stages} == {"merge"}
    assert (plan.scorer.name, plan.restore, plan.protect) == ("likeness", "last", Protect(first=1))


def test_a_cache_is_refused() -> None:
    torch._dynamo.reset()
    model = zoo.tiny("llama", "causal")
    fast = torch.compile(model, backend="tokprune", options={"plan": SEVERAL.to_json(), "target": "eager"})
    with torch.no_grad(), pytest.raises(Exception, match="merges tokens"):
        fast(**harness.example(), use_cache=True)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
def test_targets_agree(target: str) -> None:
    model = runtimes.bert()
    by_rows = {"name": "attention", "rows": 4}
    plan = PrunePlan((Stage(1, 0.7, by_rows, leave="merge"), Stage(2, 0.4, leave="merge")), "likeness")
    x = runtimes.text(3, 17)
    expected = prunepass.prune(model, plan, x)(**x).last_hidden_state
    options = {"plan": plan.to_json(), "target": target, "config": runtimes.CONFIG.get(target)}
    fast = torch.compile(model, backend="tokprune", options={k: v for k, v in options.items() if v is not None})
    with torch.no_grad():
        found = fast(**x).last_hidden_state
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)


def test_a_learned_bias_is_no_mask_to_torch_compile_either() -> None:
    """There parameters are inputs of the graph. Unread, BEiT's bias of places would pass for a causal mask."""
    model = senses.tiny("beit")
    inputs = senses.example("beit")
    plan = PrunePlan([Stage(2, 0.4, leave="merge")], "norm")
    pruned = prunepass.prune(model, plan, inputs)
    fast = torch.compile(model, backend="tokprune", options={"plan": plan, "target": "eager"})
    with torch.no_grad():
        found, expected = fast(**inputs).last_hidden_state, pruned(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
