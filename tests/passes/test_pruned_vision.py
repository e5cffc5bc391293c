"""`prune()` of vision-language models: any images of a call, against the unpruned model that hides the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from vision_oracle import PLAN, ROWS, Reference, positions

import oracle
import prunepass.pipeline as pipeline
import vision
from prunepass import Protect, PrunePlan, ScorerSpec, Stage, prune
from prunepass.errors import ContractError, OptionError, PlanError, RefusalError
from prunepass.graph import language_part
from prunepass.graph.vision import language_model_of
from prunepass.passes.pruned_vision import PrunedVision
from prunepass.passes.state import Rewrite
from prunepass.passes.widths import InsertWidths
from prunepass.plan.images import image_plan

DAILY = ("llava", "qwen3_vl")
NAMES = [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in vision.SEERS]
#: rows without padding, a row of text alone, one row
OTHERS = ([[2, 2, 2], [25]], [[50], [3, 7]], [[3, 4]], [[12]])


@cache
def pruned(name: str) -> PrunedVision:
    made = prune(vision.tiny(name), PLAN, vision.prompt(name, ROWS))
    assert isinstance(made, PrunedVision)
    return made


def given(name: str, rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    inputs = vision.prompt(name, rows, side)
    return {**inputs, **positions(name, inputs["attention_mask"])}


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad(), oracle.float64_softmax():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_other_rows_lengths_and_images(name: str) -> None:
    for rows in (ROWS, *OTHERS):
        inputs = given(name, rows)
        found = logits(pruned(name), inputs)
        exact = Reference(name, PLAN, inputs["input_ids"].shape[1]).logits(vision.prompt(name, rows))
        assert (found[:, -1] - exact).abs().max() < 1e-10, rows


@pytest.mark.parametrize("name", NAMES)
def test_text_stays_and_has_its_values(name: str) -> None:
    """Text before the first image, which nothing that left is seen from, and rows without an image."""
    inputs = given(name, ROWS)
    found, dense = logits(pruned(name), inputs), logits(vision.tiny(name), inputs)
    live = inputs["attention_mask"].bool()
    assert (found - dense)[2][live[2]].abs().max() < 1e-10
    first = int(live[0].nonzero()[0])
    assert (found - dense)[0, first : first + 5].abs().max() < 1e-10 or name == "paligemma"  # its text sees all
    assert (found - dense)[:2, -1].abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_hiding_gives_the_same_values(name: str, side: str) -> None:
    masked = prune(vision.tiny(name), PLAN, vision.prompt(name, ROWS), mode="mask")
    for rows in (ROWS, OTHERS[0]):
        inputs = given(name, rows, side)
        live = inputs["attention_mask"].bool()
        text = live & (inputs["input_ids"] != vision.IMAGE)
        assert (logits(masked, inputs) - logits(pruned(name), inputs))[text].abs().max() < 1e-10


@pytest.mark.slow
def test_any_token_may_leave() -> None:
    plan = PrunePlan(PLAN.stages, PLAN.scorer, Protect(first=1, last=1, only_ids="any"))
    found = prune(vision.tiny("llava"), plan, vision.prompt("llava", ROWS))
    masked = prune(vision.tiny("llava"), plan, vision.prompt("llava", ROWS), mode="mask")
    for rows in (ROWS, [[25]]):
        inputs = given("llava", rows)
        assert (logits(found, inputs) - logits(masked, inputs))[:, -1].abs().max() < 1e-10


def test_it_answers_as_the_model_does() -> None:
    made, inputs = pruned("llava"), vision.prompt("llava", ROWS)
    with torch.no_grad():
        output = made(**inputs)
        dense = vision.tiny("llava")(**inputs)
    assert type(output) is type(dense)
    assert output.logits.shape == dense.logits.shape
    call = made.language_inputs(**inputs)
    assert {name: list(value.shape) for name, value in call.items()} == {
        "inputs_embeds": [*inputs["input_ids"].shape, 32],
        **{name: list(inputs["input_ids"].shape) for name in ("input_ids", "attention_mask", "position_ids")},
    }
    assert repr(made).startswith("PrunedModule(LlavaForConditionalGeneration")


class TestRefused:
    @pytest.mark.parametrize(
        ("extra", "said"),
        [
            ({"labels": torch.zeros(2, 24, dtype=torch.int64)}, "takes no labels"),
            ({"logits_to_keep": 1}, "takes no logits_to_keep"),
            ({"use_cache": True}, "takes no use_cache"),
            ({"input_ids": None}, "Pass input_ids, and pixel_values"),
        ],
    )
    def test_what_the_graph_has_no_place_for(self, extra: dict[str, Any], said: str) -> None:
        with pytest.raises(OptionError, match=said):
            pruned("llava")(**{**vision.prompt("llava", [[3, 4], [2, 5]]), **extra})

    def test_several_plans(self) -> None:
        with pytest.raises(OptionError, match="Give a single plan in place of the list"):
            prune(vision.tiny("llava"), [PLAN, PLAN], vision.prompt("llava", ROWS))

    def test_merging(self) -> None:
        plan = PrunePlan([Stage(1, 0.5, leave="merge")], ScorerSpec("norm"))
        with pytest.raises(PlanError, match='Say leave="drop" for each stage'):
            prune(vision.tiny("llava"), plan, vision.prompt("llava", ROWS))

    def test_another_stream(self) -> None:
        plan = dataclasses.replace(PLAN, stream="model.vision_tower")
        with pytest.raises(PlanError, match=r"stream is 'model\.vision_tower'.*: 'model\.language_model'\. Leave"):
            prune(vision.tiny("llava"), plan, vision.prompt("llava", ROWS))

    def test_a_language_model_that_gets_more_than_embeddings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As where the outer model makes masks of its images, which the language model by itself would not see."""
        model = vision.tiny("llava")
        inner = model.model.forward

        def changed(*args: Any, pixel_values: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            mask = attention_mask if pixel_values is None else attention_mask.flip(1)
            return inner(*args, pixel_values=pixel_values, attention_mask=mask, **kwargs)

        monkeypatch.setattr(model.model, "forward", changed)
        with pytest.raises(RefusalError, match="gives its language model attention_mask, which it does not make"):
            prune(model, PLAN, vision.prompt("llava", ROWS))


# -- the contract of the pass that counts slots ----------------------------------------------------------------------

Spoil = Callable[[Rewrite], Node]


@cache
def captured() -> tuple[nn.Module, GraphModule]:
    model, inputs = vision.tiny("llava"), vision.prompt("llava", ROWS)
    decoder = language_model_of(model)
    assert decoder is not None
    return model, language_part.capture_part(model, decoder, inputs)[0].graph_module


def no_number(state: Rewrite) -> Node:
    width = state.sites[0].width
    assert width is not None
    state.sites[0].width = width.all_input_nodes[0]
    return width.all_input_nodes[0]


def of_another_stage(state: Rewrite) -> Node:
    one, two = (site.width for site in state.sites)
    assert one is not None
    assert two is not None
    one.all_input_nodes[0].update_arg(2, 1)
    return one


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(no_number, "Nothing says how many slots"), (of_another_stage, "rows it is 7 in place of 9")],
)
def test_a_wrong_count_of_slots_is_caught(spoil: Spoil, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught = []

    @dataclasses.dataclass(frozen=True)
    class Broken(InsertWidths):
        def run(self, state: Rewrite) -> int:
            count = super().run(state)
            caught.append(spoil(state))
            return count

    monkeypatch.setattr(pipeline, "InsertWidths", Broken)
    monkeypatch.setenv("PRUNEPASS_VERIFY", "1")
    model, graph = captured()
    with pytest.raises(ContractError, match=said) as found:
        pipeline.prune_graph(graph, image_plan(PLAN, model))
    assert found.value.pass_name == "widths"
    assert found.value.node == caught[0].name
