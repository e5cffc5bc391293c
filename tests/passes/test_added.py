"""A new pass is one file: what lies in the folder and says before which pass it runs is run, and nothing else knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harness
from prunepass import PrunePlan, Stage, passes
from prunepass.errors import OptionError
from prunepass.passes import added
from prunepass.pipeline import prune_graph

PLAN = PrunePlan((Stage(1, 0.6), Stage(2, 0.3)), "norm")
LOOK = """
from dataclasses import dataclass

from prunepass.passes.contract import Pass, SitePass


@dataclass(frozen=True)
class Look({base}):
    name = "look"
    before = "{before}"

    def run(self, state):
        return {count}
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts one more file into the folder of passes."""

    def write(base: str, before: str, count: str) -> None:
        (tmp_path / "look.py").write_text(LOOK.format(base=base, before=before, count=count), encoding="utf-8")
        monkeypatch.setattr(passes, "__path__", [*passes.__path__, str(tmp_path)])

    added.found.cache_clear()
    yield write
    sys.modules.pop("prunepass.passes.look", None)
    added.found.cache_clear()


def test_it_runs_once_before_a_pass(add: Callable[..., None]) -> None:
    add("Pass", "restore", "len(state.sites)")
    labels: list[str] = []
    result = prune_graph(
        harness.captured("bert").graph_module, PLAN, metadata=False, hook=lambda label, _: labels.append(label)
    )
    assert result.changes["look"] == 2
    names = [label.partition("_")[2] for label in labels]
    assert names[names.index("restore") - 1] == "look"
    assert names.count("look") == 1


def test_it_runs_at_each_stage_before_one_that_does(add: Callable[..., None]) -> None:
    add("SitePass", "narrow", "self.site.stage.layer")
    result = prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False)
    assert result.changes["look"] == 1 + 2


@pytest.mark.parametrize(
    ("base", "before", "said"),
    [
        ("Pass", "restor", "Look runs before 'restor'; there are .*narrow.*restore"),
        ("SitePass", "restore", "Look works at a stage, and 'restore', before which it runs, does not"),
    ],
)
def test_a_place_that_cannot_be_is_refused(add: Callable[..., None], base: str, before: str, said: str) -> None:
    add(base, before, "0")
    with pytest.raises(OptionError, match=said):
        prune_graph(harness.captured("bert").graph_module, PLAN, metadata=False)
