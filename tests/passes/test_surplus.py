"""Slots that hold no token, where only some tokens may leave; and a graph with a prompt, whose pass is broken."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import prunepass.pipeline as pipeline
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import ContractError
from prunepass.graph.prompts import mark_prompt
from prunepass.passes.state import Rewrite
from prunepass.passes.surplus import HideSurplus

PLAN = PrunePlan((Stage(1, 0.5), Stage(2, 0.25)), "norm", Protect(first=1, last=1, only_ids=(90,)))
#: the first row has 12 tokens, eight of which may leave; the second has 10, none of which may
IDS = torch.tensor([[1, 5, *[90] * 8, 6, 7], [0, 0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
WIDTHS = (10, 10)


class Prompted(nn.Module):
    """A language model as the outer one calls it."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.decoder = zoo.tiny("llama", use_cache=False)

    def forward(self, ids: Tensor, mask: Tensor, embeds: Tensor) -> Any:
        marked = mark_prompt(embeds, ids, mask, list(self.widths))
        return self.decoder(inputs_embeds=marked, attention_mask=mask).last_hidden_state


@dataclasses.dataclass(frozen=True)
class Forgetful(HideSurplus):
    def run(self, state: Rewrite) -> int:
        return 0


@cache
def traced(rows: int = 2, widths: tuple[int, ...] = WIDTHS) -> tuple[GraphModule, tuple[Any, ...]]:
    graphs: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def keep(gm: GraphModule, inputs: Any) -> GraphModule:
        graphs.append((gm, tuple(inputs)))
        return gm

    torch._dynamo.reset()
    model = Prompted(widths)
    width = model.decoder.config.hidden_size
    embeds = torch.randn(*IDS.shape, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.compile(model, backend=keep)(IDS[:rows], (IDS[:rows] != 0).long(), embeds[:rows])
    return graphs[0]


def test_rows_keep_shares_of_what_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1")
    gm, inputs = traced()
    result = pipeline.prune_graph(gm, PLAN)
    by_name = {n.name: n for n in result.graph_module.graph.nodes}
    output = next(iter(result.graph_module.graph.find_nodes(op="output")))
    output.args = ([by_name[site.kept.alive.name] for site in result.sites if site.kept and site.kept.alive],)
    result.graph_module.recompile()
    with torch.no_grad():
        alive = result.graph_module(*inputs)
    assert [a.sum(1).tolist() for a in alive] == [[4 + 4, 10], [4 + 2, 10]]
    assert tuple(a.shape[1] for a in alive) == WIDTHS


@pytest.mark.parametrize("restore", ["last", "mean"])
def test_a_row_alone_is_the_row_in_its_batch(restore: Any) -> None:
    """Alone it has no empty slots; in the batch some, though it has no padding that they could stand at."""
    outputs = []
    for gm, inputs in (traced(), traced(1, (8, 6))):
        graph = pipeline.prune_graph(gm, dataclasses.replace(PLAN, restore=restore)).graph_module
        with torch.no_grad():
            outputs.append(graph(*inputs)[0][0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)


def test_an_attention_to_empty_slots_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "HideSurplus", Forgetful)
    gm, _ = traced()
    with pytest.raises(ContractError, match="attends to slots that hold no token"):
        pipeline.prune_graph(gm, PLAN)
