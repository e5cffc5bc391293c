"""`generate()` with a plan for the tower of a vision-language model, each step against the tower that hides patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from tower_oracle import PACKED, PATHS, TOWER, hide_in_tower, plans_of, reference
from vision_oracle import PLAN, ROWS, longer, positions

import oracle
import vision
import zoo
from prunepass import PrunePlan
from prunepass.dynamo.backend import compilations
from prunepass.dynamo.towers import CompiledTower
from prunepass.errors import PlanError, RefusalError

STEPS = 3
DAILY = ("llava", "idefics3")
NAMES = [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in PATHS]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(name: str, plans: Any, **options: Any) -> Any:
    model: Any = vision.tiny(name)
    model.compile(backend="tokprune", options={"plan": plans, "target": "eager", **options})
    return model


def check_greedy(name: str, language: PrunePlan | None, rows: list[list[int]] = ROWS) -> None:
    fast, inputs, cache = compiled(name, plans_of(name, language)), vision.prompt(name, rows), None
    exact_model = reference(name, language or PrunePlan(()), TOWER, inputs["input_ids"].shape[1])
    for step in range(STEPS):
        mask = inputs["attention_mask"]
        given = {**inputs, **positions(name, mask)}
        if step:
            beside = {k: v[:, -1:] for k, v in positions(name, mask).items()}
            given = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask, **beside}
        with torch.no_grad(), oracle.float64_softmax():
            found = fast(**given, past_key_values=cache, use_cache=True)
        exact = exact_model.logits(inputs)
        assert (found.logits[:, -1] - exact).abs().max() < 1e-10, step
        cache = found.past_key_values
        inputs = longer(name, inputs, exact.argmax(-1, keepdim=True))
    first = next(c.result for c in compilations() if c.result is not None)  # the tower's
    assert len(first.sites) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_step_of_both(name: str) -> None:
    check_greedy(name, PLAN)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "llava" else pytest.mark.slow) for n in PATHS])
def test_each_step_of_a_tower_alone(name: str) -> None:
    check_greedy(name, None)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "llava" else pytest.mark.slow) for n in PATHS])
def test_generate(name: str) -> None:
    """By itself: it reads images before the first call of the model."""
    inputs = vision.prompt(name, ROWS)
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = compiled(name, plans_of(name, PLAN)).generate(**inputs, **options)
    exact_model, given = reference(name, PLAN, TOWER, inputs["input_ids"].shape[1]), inputs
    for step in range(STEPS):
        exact = exact_model.logits(given)
        assert (found.logits[step] - exact).abs().max() < 1e-5  # generate() rounds logits to float32
        given = longer(name, given, found.sequences[:, inputs["input_ids"].shape[1] + step][:, None])


def test_text_alone_and_the_calls_after_it() -> None:
    fast, inputs = compiled("llava", plans_of("llava", PLAN)), vision.prompt("llava", [[12], [7]])
    with torch.no_grad():
        found, dense = fast(**inputs), vision.tiny("llava")(**inputs)
    live = inputs["attention_mask"].bool()
    assert (found.logits - dense.logits)[live].abs().max() < 1e-10
    assert not any(c.result is not None and c.result.sites for c in compilations())


def test_a_module_compiled_beside_the_original() -> None:
    """``torch.compile(model)`` leaves the original as it is, its tower too."""
    model, inputs = vision.tiny("llava"), vision.prompt("llava", ROWS)
    fast = torch.compile(model, backend="tokprune", options={"plan": {"vision_tower": TOWER}, "target": "eager"})
    hiding = vision.tiny("llava")
    hide_in_tower(hiding, "llava", TOWER)
    with torch.no_grad():
        dense = model(**inputs).logits
        found, exact, again = fast(**inputs).logits, hiding(**inputs).logits, model(**inputs).logits
    live = inputs["attention_mask"].bool()
    assert (found - exact)[live].abs().max() < 1e-10
    assert torch.equal(dense, again)
    assert (found - dense)[live].abs().max() > 1e-4


def test_another_plan_takes_the_place_of_the_first() -> None:
    model = compiled("llava", plans_of("llava", PLAN))
    assert isinstance(model.model.vision_tower._compiled_call_impl, CompiledTower)
    model.compile(backend="tokprune", options={"plan": PLAN, "target": "eager"})
    assert model.model.vision_tower._compiled_call_impl is None


class TestRefused:
    @pytest.mark.parametrize("name", PACKED)
    def test_all_images_in_one_row(self, name: str) -> None:
        with pytest.raises(RefusalError, match=r"^model\.visual: .* patches of all images in one row"), torch.no_grad():
            compiled(name, {"visual": TOWER}).generate(**vision.prompt(name, ROWS), max_new_tokens=1)

    @pytest.mark.slow
    def test_all_images_in_one_row_run_on_request(self) -> None:
        inputs = vision.prompt("qwen2_vl", ROWS)
        fast = compiled("qwen2_vl", {"visual": TOWER}, fallback="dense")
        with torch.no_grad():
            found, dense = fast(**inputs).logits, vision.tiny("qwen2_vl")(**inputs).logits
        assert (found - dense)[inputs["attention_mask"].bool()].abs().max() < 1e-10

    def test_images_that_are_packed_inside(self) -> None:
        with (
            pytest.raises(BackendCompilerFailed, match=r"modeling_pixtral\.py:\d+: torch\.compile splits"),
            torch.no_grad(),
        ):
            compiled("mistral3", {"vision_tower": TOWER})(**vision.prompt("mistral3", ROWS))

    def test_a_model_without_a_tower(self) -> None:
        fast: Any = zoo.tiny("llama", "causal")
        fast.compile(backend="tokprune", options={"plan": {"vision_tower": TOWER}, "target": "eager"})
        with pytest.raises(BackendCompilerFailed, match="gives a plan to each of 'vision_tower'"), torch.no_grad():
            fast(input_ids=torch.randint(5, 60, (2, 9)))

    def test_a_name_that_is_no_module(self) -> None:
        with pytest.raises(PlanError, match="'towers' names no module"):
            compiled("llava", {"towers": TOWER})
