"""What a pass requires has a negative twin: where the pass before it does nothing, it says what is missing."""

from __future__ import annotations

import dataclasses

import pytest
from test_contracts import PLAN, source_of

import harness
import prunepass.pipeline as pipeline
from prunepass.errors import ContractError
from prunepass.passes.contract import Pass
from prunepass.passes.hoist import HoistReads
from prunepass.passes.live import InsertLive
from prunepass.passes.pool import PoolKept
from prunepass.passes.state import Rewrite
from prunepass.pipeline import prune_graph

#: a pass that does nothing, the pass after it that finds its work undone, what that one says, model
UNDONE: tuple[tuple[str, str, str, str], ...] = (
    ("Place", "check", "No stage was placed", "base"),
    ("InsertLive", "score before block 1", "Nothing says which tokens are live", "base"),
    ("InsertScore", "select before block 1", "no scores to choose by", "base"),
    ("InsertScore", "gate before block 1", "no scores to choose by", "gated"),
    ("InsertSelect", "narrow before block 1", "no indices of kept tokens", "base"),
    ("InsertSelect", "hide before block 1", "no marks of kept tokens", "mask"),
    ("Narrow", "score before block 2", "was not narrowed", "base"),
    ("Narrow", "restore", "has no effect yet", "one stage"),
    ("Narrow", "pool", "has no effect yet", "pooled, one stage"),
)


@pytest.mark.parametrize(
    ("idle", "label", "said", "kind"), UNDONE, ids=[f"{case[0]}-{case[1].replace(' ', '_')}" for case in UNDONE]
)
def test_a_pass_that_finds_work_undone_says_so_before_it_runs(
    idle: str, label: str, said: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: type[Pass] = getattr(pipeline, idle)

    @dataclasses.dataclass(frozen=True)
    class Idle(good):  # type: ignore[valid-type, misc]  # a class chosen by the case
        def run(self, state: Rewrite) -> int:
            return 0

        def ensures(self, state: Rewrite) -> tuple[()]:
            return ()

        def verify(self, state: Rewrite) -> tuple[()]:
            return ()

    monkeypatch.setattr(pipeline, idle, Idle)
    graph, options = source_of(kind.partition(",")[0])
    options = {"plan": PLAN, "metadata": False, **options}
    if "one stage" in kind:
        options["plan"] = dataclasses.replace(options["plan"], stages=PLAN.stages[:1])
    if "pooled" in kind:
        options["before_restore"] = (PoolKept(),)
    with pytest.raises(ContractError, match=rf"^Before the pass {label} .*{said}") as found:
        prune_graph(graph, **options)
    assert found.value.pass_name == label


@pytest.mark.parametrize(
    ("extra", "mode", "said"),
    [(InsertLive(), "gather", "The live tokens were found before"), (HoistReads(), "mask", "the mode is 'mask'")],
    ids=["twice", "in-mask-mode"],
)
def test_a_pass_out_of_place_says_so_before_it_runs(extra: Pass, mode: str, said: str) -> None:
    with pytest.raises(ContractError, match=rf"^Before the pass {extra.name} .*{said}"):
        prune_graph(harness.captured("bert").graph_module, PLAN, mode=mode, metadata=False, extra=(extra,))
