"""The one hook around every pass: dumps, counts, times."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.fx import GraphModule

import harness
from prunepass import PrunePlan, Stage
from prunepass.pipeline import prune_graph

PLAN = PrunePlan((Stage(1, 0.5),), "random")


def test_each_pass_is_dumped_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPASS_DUMP", str(tmp_path))
    result = prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False)
    (run,) = tmp_path.iterdir()
    steps = sorted(path.name for path in run.iterdir())
    assert [name.partition("_")[2] for name in steps] == [f"{name}.py" for name in result.seconds]
    before, after = ((run / steps[i]).read_text() for i in (0, -1))
    assert "topk" not in before
    assert "topk" in after


def test_a_hook_sees_the_graph_after_each_pass_and_counts_are_kept() -> None:
    seen: list[tuple[str, int]] = []

    def hook(step: str, gm: GraphModule) -> None:
        seen.append((step, len(gm.graph.nodes)))

    result = prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False, hook=hook)
    assert [step.partition("_")[2] for step, _ in seen] == list(result.seconds)
    assert result.changes["score"] == result.changes["select"] == 1
    assert result.changes["narrow"] > 1
    assert seen[-1][1] > seen[0][1]
