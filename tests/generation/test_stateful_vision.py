"""The language models of vision-language models with their caches inside, step by step against the masked model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")

import openvino
import torch
from test_stateful import FULL
from torch import Tensor
from vision_oracle import PLAN, ROWS, Reference, longer, positions

import oracle
import prunepass
import vision
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.errors import OptionError
from prunepass.generation.stateful import stateful_program
from prunepass.graph.language_part import CallReader
from prunepass.graph.vision import language_model_of
from prunepass.plan.images import image_plan

ONE = PrunePlan([Stage(1, 0.5)], ScorerSpec("norm"))
STEPS = 3
NAMES = [pytest.param(n, marks=() if n == "llava" else pytest.mark.slow) for n in vision.SEERS]
#: inputs of one step by name, [B, P + S] mask of all tokens, how many of them are past -> [B, V] logits
Step = Callable[[dict[str, Tensor], Tensor, int], Tensor]


def differences(name: str, plan: PrunePlan, rows: list[list[int]], step: Step) -> Iterator[float]:
    """Greedy search: of each step the largest difference of logits from the unpruned model that hides what left."""
    model, inputs = vision.tiny(name), vision.prompt(name, rows)
    decoder = language_model_of(model)
    assert decoder is not None
    reader = CallReader.of(model, decoder, vision.prompt(name, ROWS))[0]
    reference, past = Reference(name, plan, inputs["input_ids"].shape[1]), 0
    for _ in range(STEPS):
        mask = inputs["attention_mask"]
        with torch.no_grad(), oracle.float64_softmax():
            call = reader.read(**inputs, **positions(name, mask))
            found = step({key: value[:, past:].contiguous() for key, value in call.items()}, mask, past)
            exact = reference.logits(inputs)
        yield float((found - exact).abs().max())
        past = mask.shape[1]
        inputs = longer(name, inputs, 5 + exact.argmax(-1, keepdim=True) % 50)  # no image


@pytest.mark.parametrize("name", NAMES)
def test_each_step_sees_what_layers_kept_of_images(name: str) -> None:
    plan = PLAN if name != "llava" else ONE
    model = vision.tiny(name)
    found = stateful_program(model, image_plan(plan, model), vision.prompt(name, ROWS))
    module = found.program.module(check_guards=False)
    fakes = {n.name: n.meta["val"] for n in found.program.graph.find_nodes(op="placeholder") if "val" in n.meta}
    for rows in (ROWS, [[2, 2, 2], [25]]):
        held: dict[str, Any] = {
            n: torch.zeros(len(rows), fakes[n].shape[1], 0, fakes[n].shape[3], dtype=fakes[n].dtype)
            for n in found.states
        }

        def step(call: dict[str, Tensor], mask: Tensor, past: int, held: dict[str, Any] = held) -> Tensor:
            out = module(**call, past_mask=mask[:, :past], **held)
            held |= {name: out[after] for name, after in found.states.items()}
            logits: Tensor = out["logits"][:, -1]
            return logits

        assert max(differences(name, plan, rows, step)) < 1e-10, rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_an_openvino_folder_goes_on_step_by_step(name: str, tmp_path: Path) -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in vision.prompt(name, ROWS).items()}
    folder = prunepass.export(
        vision.tiny(name, torch.float32), ONE, tmp_path / "out", stateful=True, example_inputs=inputs
    )
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", FULL)
    for rows in (ROWS, [[2, 2, 2], [25]]):
        request = compiled.create_infer_request()

        def step(call: dict[str, Tensor], mask: Tensor, past: int, request: Any = request) -> Tensor:
            given = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in call.items()}
            given |= {"attention_mask": mask.numpy(), "beam_idx": torch.arange(len(mask), dtype=torch.int32).numpy()}
            return torch.from_numpy(request.infer(given)["logits"][:, -1].copy()).double()

        assert max(differences(name, ONE, rows, step)) < 1e-4, rows


def test_what_does_not_go_together(tmp_path: Path) -> None:
    model, inputs = vision.tiny("llava", torch.float32), vision.prompt("llava", ROWS)
    with pytest.raises(OptionError, match="example_inputs that hold images"):
        prunepass.export(model, ONE, tmp_path / "out", stateful=True)
    with pytest.raises(OptionError, match="leave out length, or pass stateful=False"):
        prunepass.export(model, ONE, tmp_path / "out", stateful=True, example_inputs=inputs, length=40)
