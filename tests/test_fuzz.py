"""The first of the fuzzer's cases (`fuzz`), and that it would notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import harness
from fuzz import checks
from fuzz.cases import GROUP, WAYS, Call, Episode, draw
from fuzz.checks import Outcome, run
from fuzz.ties import Choices
from prunepass import PrunePlan, Stage

QUICK = {way: WAYS[way] for way in ("mask", "alone", "program")}
EACH = 4


def outcome_of(seeds: range, ways: dict[str, int], calls: int | None = None) -> Outcome:
    """Of the first ``calls`` calls of each episode."""
    total = Outcome()
    for seed in seeds:
        drawn = draw(seed, ways)
        found = run(replace(drawn, calls=drawn.calls[:calls]))
        total.counts += found.counts
        total.notes += found.notes
    return total


@pytest.mark.parametrize("group", range(8))
def test_nothing_is_wrong_or_raw(group: int) -> None:
    outcome = outcome_of(range(group * GROUP, group * GROUP + EACH), QUICK)
    assert not outcome.notes
    assert outcome.counts["same"] >= 10


@pytest.mark.parametrize("way", ["openvino", "onnxruntime", "export onnx"])
def test_nothing_is_wrong_or_raw_on_a_target(way: str) -> None:
    outcome = outcome_of(range(3 * GROUP, 3 * GROUP + 1), {way: 1}, calls=5)
    assert not outcome.notes
    assert outcome.counts["same"] >= 4


def test_a_seed_gives_one_episode() -> None:
    assert draw(77) == draw(77)
    assert draw(77).calls != draw(78).calls


def test_every_way_is_drawn() -> None:
    drawn = Counter(draw(seed).way for seed in range(0, 4000, 7))
    assert set(drawn) == set(WAYS)


CALLS = (Call((9, 5), 2, "right", False, 1), Call((12,), 0, "left", False, 2))


def episode(way: str = "mask") -> Episode:
    plan = PrunePlan((Stage(1, 0.5, "norm"), Stage(2, 0.3)))
    return Episode(0, "bert", "base", way, torch.float64, plan, ("input_ids", "attention_mask"), CALLS)


def test_it_notices_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(episode()).counts == {"same": 2}
    other = replace(episode(), plan=PrunePlan((Stage(1, 0.4, "norm"), Stage(2, 0.3))))
    right = checks.pruned
    monkeypatch.setattr(checks, "pruned", lambda e, source, mode: right(other if mode == "gather" else e, source, mode))
    assert run(episode()).counts == {"wrong": 2}


def test_it_notices_a_row_that_hangs_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaky(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": input_ids.double() + 1e-3 * input_ids.shape[0]}

    right = checks.pruned

    def leaky(e: Episode, source: object, mode: str) -> object:
        found = right(e, source, mode)  # type: ignore[arg-type]
        return replace(found, graph_module=Leaky()) if mode == "gather" else found

    monkeypatch.setattr(checks, "pruned", leaky)
    monkeypatch.setattr(checks, "model_of", lambda e: harness.captured("bert").graph_module)
    assert run(episode("alone")).counts["wrong"] == 1  # the row of the second call is alone anyway


def test_it_tells_raw_errors_from_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(episode(), plan=PrunePlan((Stage(40, 0.5, "norm"),)))
    assert run(wrong).counts == {"refused": 2}

    def broken(*args: object) -> None:
        raise IndexError("a raw one")

    monkeypatch.setattr(checks, "captured", broken)
    outcome = run(episode())
    assert outcome.counts == {"raw": 2}
    assert "IndexError: a raw one" in outcome.notes[0]


def test_gaps_of_scores() -> None:
    """Row 0 must choose between tokens with one score, as they are one token; in row 1 the scores are far apart."""
    source = harness.captured("bert", inputs=("input_ids", "attention_mask", "position_ids"))
    masked = harness.pruned(source, PrunePlan((Stage(0, 0.5, "norm"),)), "mask")
    same = torch.tensor([[7, 7, 7, 7, 7, 7], [5, 6, 7, 8, 9, 10]])
    gaps = Choices(masked).gaps(
        {"input_ids": same, "attention_mask": torch.ones_like(same), "position_ids": torch.zeros_like(same)}
    )
    assert float(gaps[0]) < 1e-12
    assert float(gaps[1]) > 1e-6
