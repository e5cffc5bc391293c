"""The pass that leaves the end of a stream short: what its contract finds in graphs that were broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import harness
import prunepass.pipeline
from prunepass import PrunePlan, Stage
from prunepass.errors import ContractError
from prunepass.passes.short import LeaveShort
from prunepass.passes.state import Rewrite
from prunepass.pipeline import prune_graph

PLAN = PrunePlan((Stage(1, 0.5),), "norm", restore="none")


@dataclass(frozen=True)
class _WithoutMask(LeaveShort):
    def run(self, state: Rewrite) -> int:
        return 0


@dataclass(frozen=True)
class _WithAnotherMask(LeaveShort):
    def run(self, state: Rewrite) -> int:
        super().run(state)
        given: Any = state.output.args[0]
        kept = state.sites[-1].kept
        assert kept is not None
        state.output.args = ((*given[:-1], kept.alive),)
        return 1


@pytest.mark.parametrize(
    ("broken", "message"), [(_WithoutMask, "results, and had"), (_WithAnotherMask, "in place of torch.int64")]
)
def test_short_states_go_with_their_mask(
    broken: type[LeaveShort], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prunepass.pipeline, "LeaveShort", broken)
    with pytest.raises(ContractError, match=message):
        prune_graph(harness.captured("distilbert").graph_module, PLAN, metadata=False)


def test_an_encoder_alone_returns_short_states_and_their_mask() -> None:
    result = prune_graph(harness.captured("distilbert").graph_module, PLAN, metadata=False)
    assert result.short is not None
    assert result.short.told
    x = harness.example()
    output = harness.run(result.graph_module, x)
    assert torch.equal(output.encoder_attention_mask.sum(1), torch.tensor([6, 4]))
    assert tuple(output.last_hidden_state.shape[:2]) == tuple(output.encoder_attention_mask.shape)
