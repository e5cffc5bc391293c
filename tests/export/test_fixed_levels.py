"""Levels of models that make their tokens of an image or a sound, most of them a fixed number."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from test_export import load
from torch import Tensor, nn

import prunepass
import senses
import zoo
from prunepass import PrunePlan, Stage
from prunepass.plan.levels import LEVEL

SCORERS = ("norm", "random", "position", "likeness", "attention")


@cache
def whisper(dtype: Any = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**senses._WHISPER)
    return zoo.randomize(transformers.WhisperModel(config).get_encoder().to(dtype).eval(), 0)


def given(name: str, dtype: Any = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "whisper":
        return whisper(dtype), senses.example("whisper-classifier", 3, dtype=dtype)
    return senses.tiny(name, dtype), senses.example(name, 3, dtype=dtype)


def plans(scorer: str, restore: Any = "last", leave: Literal["drop", "merge"] = "drop") -> list[PrunePlan]:
    first = 1 if scorer == "attention" else 0
    several = ([Stage(first, 0.6), Stage(2, "1/3")], [Stage(first, 0.4), Stage(2, "1/5")], [Stage(2, 0.5)])
    return [PrunePlan([Stage(s.layer, s.keep, leave=leave) for s in one], scorer, restore=restore) for one in several]


def check(
    run: Any, chosen: list[PrunePlan], model: nn.Module, x: dict[str, Tensor], tolerance: float, live: Any = ...
) -> None:
    """``run(number)`` against the dense model and each plan alone, at the ``live`` tokens."""
    alone = [model, *(prunepass.prune(model, plan, x) for plan in chosen)]
    for number, one in enumerate(alone):
        with torch.no_grad():
            found, wanted = run(number), one(**x).last_hidden_state
        assert found.shape == wanted.shape
        assert (found - wanted)[live].abs().max() < tolerance, number


@pytest.mark.parametrize(
    ("name", "scorer", "restore"),
    [
        *(("vit", scorer, "last") for scorer in SCORERS),
        ("whisper", "position", "last"),
        ("whisper", "random", "none"),
        ("wav2vec2", "norm", "last"),
    ],
)
def test_each_level_is_its_plan(name: str, scorer: str, restore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1" if scorer in ("position", "norm") else "0")
    model, x = given(name)
    chosen = plans(scorer, restore, "merge" if scorer == "likeness" else "drop")
    several = prunepass.prune(model, chosen, x)
    live = senses.live(name, x) if name in senses.SENSES else ...
    check(lambda number: several(**x, level=number).last_hidden_state, chosen, model, x, 1e-10, live)


@pytest.mark.parametrize("target", ["openvino", "onnx", "pt2"])
def test_a_folder_of_short_states(target: str, tmp_path: Path) -> None:
    model, x = given("whisper", torch.float32)
    chosen = plans("position", "none")
    run = load(prunepass.export(model, chosen, tmp_path / "out", to=target, example_inputs=x))
    check(lambda number: run({**x, LEVEL: torch.tensor([number])})["last_hidden_state"], chosen, model, x, 1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_compiled_in_place(name: str) -> None:
    model, x = given(name)
    chosen = plans("likeness", leave="merge") if name == "vit" else plans("norm", "none")
    fast: Any = torch.compile(model, backend="tokprune", options={"plan": chosen, "target": "eager"})

    def run(number: int) -> Tensor:
        with prunepass.level(number):
            found: Tensor = fast(**x).last_hidden_state
            return found

    check(run, chosen, model, x, 1e-10)
