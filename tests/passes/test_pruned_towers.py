"""`prune()` with a plan for the tower of a vision-language model: against the tower that hides patches, alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tower_oracle import PACKED, PATHS, TOWER, hide_in_tower, plans_of, reference
from vision_oracle import PLAN, ROWS, positions

import oracle
import vision
import zoo
from prunepass import PrunePlan, Stage, prune
from prunepass.errors import CaptureError, OptionError, PlanError, RefusalError
from prunepass.passes.pruned_vision import PrunedVision

DAILY = ("llava", "gemma3", "idefics3")
NAMES = [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in PATHS]
#: two images in a row and text alone, one image, text alone
OTHERS = ([[2, 2, 2], [25]], [[3, 4]], [[12]])


@cache
def both(name: str) -> PrunedVision:
    made = prune(vision.tiny(name), plans_of(name, PLAN), vision.prompt(name, ROWS))
    assert isinstance(made, PrunedVision)
    return made


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad(), oracle.float64_softmax():
        found: Tensor = model(**inputs).logits
    return found


def given(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    inputs = vision.prompt(name, rows)
    return {**inputs, **positions(name, inputs["attention_mask"])}


@pytest.mark.parametrize("name", NAMES)
def test_a_tower_and_a_language_model(name: str) -> None:
    for rows in (ROWS, *OTHERS):
        inputs = given(name, rows)
        exact = reference(name, PLAN, TOWER, inputs["input_ids"].shape[1]).logits(vision.prompt(name, rows))
        assert (logits(both(name), inputs)[:, -1] - exact).abs().max() < 1e-10, rows


@pytest.mark.parametrize("name", NAMES)
def test_a_tower_alone(name: str) -> None:
    """The language model is the unpruned one, with the features of the tower that hides patches."""
    made = prune(vision.tiny(name), {PATHS[name]: TOWER}, vision.prompt(name, ROWS))
    hiding = vision.tiny(name)
    hide_in_tower(hiding, name, TOWER)
    inputs = given(name, ROWS)
    live = inputs["attention_mask"].bool()
    found, exact, dense = (logits(model, inputs)[live] for model in (made, hiding, vision.tiny(name)))
    assert (found - exact).abs().max() < 1e-10
    assert (found - dense).abs().max() > 1e-4
    text = given(name, [[12], [7]])
    live = text["attention_mask"].bool()
    assert (logits(made, text) - logits(vision.tiny(name), text))[live].abs().max() < 1e-10


def test_what_is_hidden_is_hidden_in_both() -> None:
    masked = prune(
        vision.tiny("llava"), {"vision_tower": TOWER, "language_model": PLAN}, vision.prompt("llava", ROWS), mode="mask"
    )
    inputs = given("llava", ROWS)
    assert (logits(masked, inputs) - logits(both("llava"), inputs))[:, -1].abs().max() < 1e-10


def test_the_original_is_left_as_it_is() -> None:
    model = vision.tiny("llava")
    inputs = given("llava", ROWS)
    dense = logits(model, inputs)
    made = prune(model, {"vision_tower": TOWER}, vision.prompt("llava", ROWS))
    logits(made, inputs)
    assert torch.equal(logits(model, inputs), dense)
    assert "forward" not in vars(model.model.vision_tower)
    assert torch.equal(logits(copy.deepcopy(made), inputs), logits(made, inputs))


def test_patches_of_padding_are_no_tokens() -> None:
    """The second of two images is a half of the width, so that it keeps a half as many patches."""
    name, rows = "idefics3", [[3, 4, 5]]
    inputs = given(name, rows)
    seen = torch.ones(1, 2, 16, 16, dtype=torch.bool)
    seen[:, 1, :, 8:] = False
    inputs["pixel_attention_mask"] = seen
    made = prune(vision.tiny(name), {"vision_model": TOWER}, inputs)
    hiding = vision.tiny(name)
    hide_in_tower(hiding, name, TOWER)
    assert (logits(made, inputs) - logits(hiding, inputs)).abs().max() < 1e-10
    noise = inputs["pixel_values"].clone()
    noise[:, 1, :, :, 8:] += 3
    live = {**inputs, "pixel_values": noise}
    tower = made.towers["model.vision_model"]
    call = {
        "pixel_values": inputs["pixel_values"][0],
        "patch_attention_mask": seen[0, :, ::4, ::4],
        "return_dict": True,
    }
    with torch.no_grad():
        one, other = (tower(**{**call, "pixel_values": p["pixel_values"][0]}).last_hidden_state for p in (inputs, live))
    real = seen[0, :, ::4, ::4].reshape(2, -1)
    assert (one - other)[real].abs().max() < 1e-10


def test_it_says_what_was_pruned() -> None:
    assert list(both("llava").towers) == ["model.vision_tower"]
    assert both("llava").plan.stages == PLAN.stages
    assert "model.vision_tower: PrunePlan([Stage(1, '2/5')]" in repr(both("llava"))
    with torch.no_grad():
        features = vision.tiny("llava").model.vision_tower(torch.zeros(3, 3, 16, 16).double()).last_hidden_state
        call = {"pixel_values": torch.zeros(3, 3, 16, 16).double(), "output_hidden_states": -1, "return_dict": True}
        assert both("llava").towers["model.vision_tower"](**call).last_hidden_state.shape == features.shape


def test_nothing_to_prune() -> None:
    model, all_of_it = vision.tiny("llava"), PrunePlan([Stage(1, 1)])
    assert prune(model, {"vision_tower": all_of_it}, vision.prompt("llava", ROWS)) is model


class TestRefused:
    @pytest.mark.parametrize("name", PACKED)
    def test_all_images_in_one_row(self, name: str) -> None:
        with pytest.raises(RefusalError, match=r"model\.visual: .* patches of all images in one row, \[192, 96\]"):
            prune(vision.tiny(name), {"visual": TOWER}, vision.prompt(name, ROWS))

    def test_images_that_are_packed_inside(self) -> None:
        with pytest.raises(CaptureError, match=r"^model\.vision_tower: .* branches on a value that is computed from"):
            prune(vision.tiny("mistral3"), {"vision_tower": TOWER}, vision.prompt("mistral3", ROWS))

    def test_no_images(self) -> None:
        with pytest.raises(OptionError, match="with input_ids and pixel_values"):
            prune(vision.tiny("llava"), {"vision_tower": TOWER}, vision.prompt("llava", [[12]]))

    def test_a_block_that_the_tower_has_not(self) -> None:
        with pytest.raises(PlanError, match=r"^model\.vision_tower: .*7"):
            prune(vision.tiny("llava"), {"vision_tower": PrunePlan([Stage(7, 0.5)])}, vision.prompt("llava", ROWS))

    def test_a_module_that_is_not_called(self) -> None:
        model = vision.tiny("llava")
        model.model.spare = zoo.tiny("llama", "causal")
        with pytest.raises(RefusalError, match=r"^model\.spare: LlavaForConditionalGeneration does not call it"):
            prune(model, {"model.spare": TOWER}, vision.prompt("llava", ROWS))

    def test_another_layer_of_features(self) -> None:
        inputs = {**vision.prompt("llava", ROWS), "vision_feature_layer": -2}
        with pytest.raises(OptionError, match=r"was pruned for output_hidden_states=-1, .* is called with -2"):
            both("llava")(**inputs)

    def test_images_of_another_size(self) -> None:
        inputs = vision.prompt("idefics3", ROWS)
        inputs["pixel_values"] = torch.randn(1, 3, 3, 12, 12).double()
        with pytest.raises(OptionError, match=r"has the shape .* but axis 2 must be 16"):
            both("idefics3")(**inputs)
