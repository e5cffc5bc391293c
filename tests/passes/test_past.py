"""Graphs of later turns: what is taken out of them and put back, and scores that leave a graph; broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import ContractError, RefusalError
from prunepass.graph.capture import ensure_aten
from prunepass.graph.sizes import concrete
from prunepass.passes.past import PutBackPast, take_out_past
from prunepass.passes.scores import Returned, ReturnScores
from prunepass.passes.state import Rewrite
from prunepass.pipeline import prune_graph

PLAN = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm", Protect(first=1, last=1))
aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module", name="calls")
def _calls() -> list[GraphModule]:
    """ATen graphs of a prompt of 12 tokens and of 6 that go on from its cache."""
    graphs: list[GraphModule] = []
    model: Any = zoo.tiny("llama", "causal", use_cache=True)
    model.compile(backend=lambda gm, _: graphs.append(gm) or gm)
    ids, mask = torch.arange(36).reshape(2, 18) % 50 + 5, torch.ones(2, 18, dtype=torch.int64)
    torch._dynamo.reset()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], attention_mask=mask[:, :12]).past_key_values
        model(input_ids=ids[:, 12:], attention_mask=mask, past_key_values=cache)
    return graphs


def test_the_past_comes_back_as_it_was(calls: list[GraphModule]) -> None:
    gm = ensure_aten(calls[1])
    inputs = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    past = take_out_past(gm)
    assert len(past.cached) == 8
    assert all(not cached.users for cached, _ in past.cached)
    result = prune_graph(gm, PLAN, copy=False, extra=[PutBackPast(past)], fewer_queries=False)
    graph = result.graph_module.graph
    assert [n.name for n in graph.find_nodes(op="placeholder")] == inputs
    output = next(iter(graph.find_nodes(op="output")))
    caches = [n.meta["val"] for n in output.all_input_nodes if n.meta["val"].dim() == 4]
    lengths = sorted({concrete(x.shape[2], {}) for x in caches})
    assert lengths == [12 + 2, 12 + 4, 12 + 6]


class Stays(PutBackPast):
    def run(self, state: Rewrite) -> int:
        return 0


class Forgets(PutBackPast):
    def run(self, state: Rewrite) -> int:
        count = super().run(state)
        cached, new = self.past.cached[-1]
        for user in list(cached.users):
            user.replace_all_uses_with(new)
        state.graph.eliminate_dead_code()
        return count


@pytest.mark.parametrize(("kind", "says"), [(Stays, "was not replaced"), (Forgets, "Nothing goes on from this cache")])
def test_a_past_that_does_not_come_back(kind: type[PutBackPast], says: str, calls: list[GraphModule]) -> None:
    gm = ensure_aten(calls[1])
    with pytest.raises(ContractError, match=says):
        prune_graph(gm, PLAN, copy=False, extra=[kind(take_out_past(gm))], fewer_queries=False)


class Loses(ReturnScores):
    def run(self, state: Rewrite) -> int:
        count = super().run(state)
        given: Any = state.output.args[0]
        state.output.args = (given[:-1],)
        return count


def test_scores_of_each_stage_leave_the_graph(calls: list[GraphModule]) -> None:
    found = Returned()
    result = prune_graph(calls[0], PLAN, extra=[ReturnScores(found)])
    output: Any = next(iter(result.graph_module.graph.find_nodes(op="output"))).args[0]
    shapes = [tuple(n.meta["val"].shape) for n in output[found.results :]]
    assert found.padded
    assert shapes == [(2, 12), *[(2, 8)] * 4, *[(2, 4)] * 4]
    assert [len(places) for places in found.caches] == [2, 4]
    with pytest.raises(ContractError, match="in place of"):
        prune_graph(calls[0], PLAN, extra=[Loses(Returned())])


def test_an_attention_without_a_mask_is_refused(calls: list[GraphModule]) -> None:
    gm = ensure_aten(calls[1])
    attention = next(iter(gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)))
    attention.args = attention.args[:3]
    with pytest.raises(RefusalError, match="has no mask"):
        take_out_past(gm)
