"""Tokens merged by how alike their keys are: against DINOv2's own modules, called one after the other in plain Python.

The oracle imports nothing of prunepass: scores, hosts, means and weights are worked out token by token, in lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import runtimes
import torch
from torch import Tensor, nn

import harness
import oracle
import prunepass
import senses
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PlanError, RefusalError
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import prune_graph
from prunepass.scorers import Attention, ScoreInputs
from prunepass.scorers.likeness import LikenessScorer

BY_KEYS = {"name": "likeness", "by": "keys"}
TWO_SETS = BY_KEYS | {"sets": "two"}


def after(layer: int, keep: Any) -> Stage:
    return Stage(layer, keep, after_attention=True, leave="merge")


PLANS = {
    "in each block": PrunePlan([after(i, k) for i, k in enumerate((0.8, "3/5", 0.4, 0.3))], BY_KEYS),
    "before blocks": PrunePlan([Stage(1, "1/2", leave="merge"), Stage(3, 0.3, leave="merge")], BY_KEYS),
    "two sets": PrunePlan([after(i, k) for i, k in enumerate((0.8, "3/5", 0.5, 0.2))], TWO_SETS),
    "two sets, few left": PrunePlan([after(0, 0.5), after(1, 0.3), after(2, 0.15)], TWO_SETS),
    "two on one attention": PrunePlan([after(1, 0.7), Stage(2, 0.4, leave="merge")], BY_KEYS),
}


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


@functools.cache
def captured(name: str) -> Captured:
    return capture_module(senses.tiny(name), senses.example(name))


def _held(cosine: float) -> float:
    return round(cosine * 2**14) / 2**14


class Oracle:
    """One row of DINOv2, whose states are a list that grows shorter."""

    def __init__(self, model: Any, plan: PrunePlan, prefix: int) -> None:
        self.model, self.plan, self.prefix = model, plan, prefix
        self.history: list[list[int]] = []

    @torch.no_grad()
    def run(self, pixels: Tensor) -> Tensor:
        """[T, D]: the last states, those of tokens that left being their hosts'."""
        x = self.model.embeddings(pixels[None])[0]
        total = len(x)
        self.states, self.sizes, self.places = list(x), [1.0] * total, list(range(total))
        self.host = list(range(total))
        self.keys: list[Tensor] = []
        self.scores: list[float] = []  # as the tokens were when they attended, whatever left since
        for index, layer in enumerate(self.model.encoder.layer):
            self._stages(index, False, total)
            self._attend(layer)
            self._stages(index, True, total)
            x = torch.stack(self.states)
            self.states = list(x + layer.layer_scale2(layer.mlp(layer.norm2(x))))
        last = self.model.layernorm(torch.stack(self.states))
        at = {place: slot for slot, place in enumerate(self.places)}
        return torch.stack([last[at[self._final(token)]] for token in range(total)])

    def _final(self, token: int) -> int:
        while self.host[token] != token:
            token = self.host[token]
        return token

    def _attend(self, layer: Any) -> None:
        x, attention = torch.stack(self.states), layer.attention
        query, key, value = (
            p(layer.norm1(x)).view(len(x), -1, attention.head_dim)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * attention.scaling
        weights = (scores + torch.tensor(self.sizes, dtype=x.dtype).log()).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value).reshape(len(x), -1)
        self.keys = [key[i].mean(0) for i in range(len(x))]
        self.levels = [next(g for g in range(12) if (place + 1) % 2 ** (g + 1)) for place in self.places]
        self.two_sets = dict(self.plan.scorer.options).get("sets") == "two"
        if self.two_sets:
            self.levels = [slot % 2 for slot in range(len(x))]
        grid, alike = self.levels, self._alike()
        slots = range(len(x))
        self.scores = [-max((_held(alike[i][j]) for j in slots if grid[j] > grid[i]), default=-2.0) for i in slots]
        self.states = list(x + layer.layer_scale1(attention.o_proj(mixed)))

    def _alike(self) -> list[list[float]]:
        return [[float(torch.cosine_similarity(a, b, 0)) for b in self.keys] for a in self.keys]

    def _stages(self, index: int, behind: bool, total: int) -> None:
        for stage in self.plan.stages:
            if (stage.layer, stage.after_attention) == (index, behind):
                self._merge(stage, oracle.count(total, stage.keep, Protect(first=self.prefix)))

    def _merge(self, stage: Any, count: int) -> None:
        slots, alike = range(len(self.states)), self._alike()
        ranked = sorted(slots, key=lambda i: (self.places[i] >= self.prefix, -self.scores[i], i))
        stay = sorted(ranked[:count])
        met = {i: [i] for i in stay}
        for i in slots:
            if i not in met and stage.leave == "merge":
                hosts = [j for j in stay if self.places[j] >= self.prefix]
                if self.two_sets and self.levels[i] == 0:
                    hosts = [j for j in hosts if self.levels[j] == 1]
                host = max(hosts, key=lambda j: (alike[i][j], -j))
                met[host].append(i)
                self.host[self.places[i]] = self.places[host]
        for i, members in met.items():
            size = sum(self.sizes[j] for j in members)
            self.states[i] = sum(self.sizes[j] * self.states[j] for j in members) / size
            self.sizes[i] = size
        for name in ("states", "sizes", "places", "keys", "scores", "levels"):
            setattr(self, name, [getattr(self, name)[i] for i in stay])
        self.history.append(list(self.places))


@pytest.mark.parametrize("label", PLANS)
@pytest.mark.parametrize("name", ["dinov2", pytest.param("dinov2-registers", marks=pytest.mark.slow)])
def test_graphs_agree_with_modules_called_one_by_one(name: str, label: str) -> None:
    plan = PLANS[label]
    x = senses.example(name, 2, seed=3)
    model: Any = senses.tiny(name)
    expected = torch.stack([Oracle(model, plan, senses.SENSES[name].prefix).run(row) for row in x["pixel_values"]])
    for mode in ("gather", "mask"):
        graph = prune_graph(captured(name).graph_module, plan, mode=mode, metadata=False).graph_module
        found = harness.run(graph, x).last_hidden_state
        assert float((found - expected).abs().max()) < 1e-10, mode


@pytest.mark.parametrize("last", [0.05, 0.02])
def test_tokens_without_a_host_keep_their_own_state(last: float) -> None:
    """Where the class token alone stays, it hosts none; where one stays beside it, all of them have that one."""
    x, plan = senses.example("dinov2", 2, seed=3), PrunePlan([after(0, 0.5), after(1, last)], TWO_SETS)
    prunings = [prune_graph(captured("dinov2").graph_module, plan, mode=m, metadata=False) for m in ("gather", "mask")]
    found, expected = (harness.run(pruning.graph_module, x).last_hidden_state for pruning in prunings)
    assert float((found - expected).abs().max()) < 1e-10
    kinds = len(found[0].unique(dim=0))
    assert (kinds == 2) == (last == 0.05)


@pytest.mark.parametrize("leave", ["drop", "merge"])
def test_attention_of_a_pruned_block_is_read_where_the_length_is_fixed(leave: Any) -> None:
    """From the second stage on the attention before may have a mask: of the sizes of what was merged."""
    stages = [Stage(i, keep, leave=leave) for i, keep in ((1, 0.6), (2, 0.4), (3, 0.2))]
    x, plan = senses.example("dinov2", 2, seed=3), PrunePlan(stages, "attention")
    graphs = [prune_graph(captured("dinov2").graph_module, plan, mode=m, metadata=False) for m in ("gather", "mask")]
    found, expected = (harness.run(pruning.graph_module, x).last_hidden_state for pruning in graphs)
    assert float((found - expected).abs().max()) < 1e-10


def test_two_sets_are_told_by_slices_at_each_stage() -> None:
    nodes = prune_graph(captured("dinov2").graph_module, PLANS["two sets"], metadata=False).graph_module.graph.nodes
    halves = [n for n in nodes if n.target is torch.ops.aten.slice.Tensor and n.args[4:] == (2,)]
    assert [n.meta["prunepass"]["stage"] for n in halves] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_keys_are_averaged_over_heads_and_say_where_tokens_go() -> None:
    key = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    key[0, 0] = torch.tensor([[9.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0.1, 0]])
    inputs = ScoreInputs(torch.randn(1, 4, 5), None, torch.arange(4)[None], attention=Attention(key=key))
    scorer = LikenessScorer("keys")
    found = scorer.hosts(inputs).vectors
    assert found is not None
    torch.testing.assert_close(found, key[:, 0] / 2)
    assert scorer(inputs)[0].argsort().tolist()[0] == 0, "the first is as the last, which is of the coarsest grid"


def test_what_it_compares_by_is_said() -> None:
    with pytest.raises(PlanError, match="states, keys"):
        LikenessScorer("queries")
    plan = PrunePlan([Stage(0, 0.5, leave="merge")], BY_KEYS)
    with pytest.raises(PlanError, match="attention of the block before"):
        prunepass.prune(senses.tiny("vit"), plan, senses.example("vit"))


def test_a_model_that_spells_its_attention_out_is_refused() -> None:
    with pytest.raises(RefusalError, match="'by': 'states'"):
        harness.pruned(harness.captured("deberta-v2"), PrunePlan([Stage(1, 0.5)], BY_KEYS))


@pytest.mark.parametrize("scorer", [BY_KEYS, TWO_SETS], ids=["grids", "two sets"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_row_alone_is_the_row_in_its_batch(name: str, scorer: dict[str, str]) -> None:
    stages = [after(0, 0.7), Stage(2, 0.5), after(2, 0.3)]
    graph = harness.pruned(harness.captured(name), PrunePlan(stages, scorer, Protect(first=1, last=1))).graph_module
    x = zoo.batch([13, 9, 4], seed=1, high=40)
    together = harness.run(graph, x)[0]
    for b, live in enumerate(x["attention_mask"].bool()):
        alone = harness.run(graph, {k: v[b : b + 1, live] for k, v in x.items()})[0]
        assert float((alone[0] - together[b, live]).abs().max()) < 1e-10


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
def test_targets_agree(target: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = senses.tiny("dinov2", torch.float32)
    x = senses.example("dinov2", 3, dtype=torch.float32)
    plan = PLANS["two sets"]
    expected = prunepass.prune(model, plan, x)(**x).last_hidden_state
    options = {"plan": plan.to_json(), "target": target, "config": runtimes.CONFIG.get(target)}
    fast = torch.compile(model, backend="tokprune", options={k: v for k, v in options.items() if v is not None})
    with torch.no_grad():
        found = fast(**x).last_hidden_state
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)


def test_gradients_flow_through_hosts_chosen_by_keys() -> None:
    x = zoo.batch([13, 9], seed=1, high=40)
    live, grads = x["attention_mask"].bool(), []
    for mode in ("gather", "mask"):
        graph = harness.pruned(harness.captured("bert"), PrunePlan([after(1, 0.5)], BY_KEYS), mode).graph_module
        weights = [p for n, p in graph.named_parameters() if "layer.0" in n]
        grads.append(torch.autograd.grad((graph(**x)[0][live] ** 2).sum(), weights))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
