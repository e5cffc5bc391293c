"""Vision-language models: `generate()` with image tokens that leave, against the unpruned model that hides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from vision_oracle import PLAN, ROWS, Reference, longer, positions

import oracle
import vision
import zoo
from prunepass import Protect, PrunePlan, ScorerSpec, Stage, prune
from prunepass.dynamo.backend import compilations
from prunepass.errors import OptionError, PlanError, RefusalError

STEPS = 3
DAILY = ("llava", "gemma3")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def some(names: Sequence[str] = tuple(vision.SEERS), daily: Sequence[str] = DAILY) -> list[Any]:
    return [pytest.param(n, marks=() if n in daily else pytest.mark.slow) for n in names]


def compiled(model: Any, plan: Any = PLAN, target: str = "eager", **options: Any) -> Any:
    model.compile(backend="tokprune", options={"plan": plan, "target": target, **options})
    return model


def check_greedy(name: str, rows: list[list[int]], plan: PrunePlan = PLAN, steps: int = STEPS, fast: Any = None) -> Any:
    """Prefill and greedy steps, each against the reference; returns the cache."""
    fast, inputs = fast or compiled(vision.tiny(name), plan), vision.prompt(name, rows)
    reference, cache = Reference(name, plan, inputs["input_ids"].shape[1]), None
    for step in range(steps):
        mask = inputs["attention_mask"]
        given = {**inputs, **positions(name, mask)}
        if step:
            beside = {k: v[:, -1:] for k, v in positions(name, mask).items()}
            if name.startswith("qwen"):
                behind = (mask.cumsum(1) - 1)[None, :, -1:] + fast.model.rope_deltas
                beside = {"position_ids": behind.expand(3, -1, -1)}
            given = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask, **beside}
        with torch.no_grad(), oracle.float64_softmax():
            found = fast(**given, past_key_values=cache, use_cache=True)
        exact = reference.logits(inputs)
        assert (found.logits[:, -1] - exact).abs().max() < 1e-10, (name, step)
        cache = found.past_key_values
        inputs = longer(name, inputs, exact.argmax(-1, keepdim=True))
    return cache


@pytest.mark.parametrize("name", some())
def test_later_tokens_see_what_layers_kept_of_images(name: str) -> None:
    cache = check_greedy(name, ROWS)
    tokens = vision.SEERS[name].tokens
    if name in ("gemma3", "aya_vision"):
        return  # caches of windows hold a slot for each position
    whole = 11 + 4 + 2 * tokens
    kept = [11 + 4 + max(math.ceil(2 * tokens * k), 0) for k in (Fraction(1, 2), Fraction(1, 5))]
    assert [layer.keys.shape[2] - STEPS + 1 for layer in cache.layers] == [whole, *kept, kept[-1]]


def test_batches_of_other_shapes_run_in_the_same_graphs() -> None:
    """A row that is not padded and keeps less than another has slots without a token; so has one where no slot goes."""
    fast = compiled(vision.tiny("llava"))
    for rows in ([[2, 2, 2], [25]], [[50], [3, 7]], [[1, 0, 1]]):
        check_greedy("llava", rows, steps=2, fast=fast)
    assert sum(c.result is not None and len(c.result.sites) == 2 for c in compilations()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_the_text_asks_which_tokens_stay(name: str) -> None:
    for rows in (1, 5, 64):
        torch.compiler.reset()
        check_greedy(name, ROWS, PrunePlan(PLAN.stages, ScorerSpec.of({"name": "prompt", "rows": rows})), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_generate(name: str) -> None:
    """By itself, with the positions and masks that it makes; and a row alone as in its batch."""
    fast, inputs = compiled(vision.tiny(name)), vision.prompt(name, ROWS)
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = fast.generate(**inputs, **options)
    reference, given = Reference(name, PLAN, inputs["input_ids"].shape[1]), inputs
    for step in range(STEPS):
        exact = reference.logits(given)
        assert (found.logits[step] - exact).abs().max() < 1e-5  # generate() rounds logits to float32
        given = longer(name, given, found.sequences[:, inputs["input_ids"].shape[1] + step][:, None])
    with torch.no_grad():
        alone = fast.generate(**vision.prompt(name, ROWS[:1]), **options)
    assert (torch.stack(alone.logits) - torch.stack(found.logits)[:, :1]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["inductor", "openvino", "onnxruntime"])
def test_every_target_generates_alike(target: str) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"} if target == "openvino" else {}
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in vision.prompt("llava", ROWS).items()}
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        exact = compiled(vision.tiny("llava", torch.float32)).generate(**inputs, **options)
        found = compiled(vision.tiny("llava", torch.float32), target=target, config=config).generate(
            **inputs, **options
        )
    assert torch.equal(found.sequences, exact.sequences)
    assert (torch.stack(found.logits) - torch.stack(exact.logits)).abs().max() < 1e-4


def test_text_alone_keeps_all_of_its_tokens(caplog: pytest.LogCaptureFixture) -> None:
    fast, inputs = compiled(vision.tiny("llava")), vision.prompt("llava", [[12], [7]])
    with torch.no_grad():
        found, dense = fast(**inputs), vision.tiny("llava")(**inputs)
    live = inputs["attention_mask"].bool()
    assert (found.logits - dense.logits)[live].abs().max() < 1e-10
    assert [layer.keys.shape[2] for layer in found.past_key_values.layers] == [12] * vision.LAYERS
    assert not caplog.messages
    assert "forward" not in vars(fast)


@pytest.mark.slow
def test_text_leaves_where_any_token_may() -> None:
    plan = PrunePlan(PLAN.stages, PLAN.scorer, Protect(first=1, last=1, only_ids="any"))
    fast, inputs = compiled(vision.tiny("llava"), plan), vision.prompt("llava", [[21], [15]])
    with torch.no_grad():
        cache = fast(**inputs).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [21, 11, 5, 5]


def test_what_cannot_be_pruned_runs_on_request() -> None:
    plan = PrunePlan([Stage(0, 0.5)], PLAN.scorer)
    inputs = vision.prompt("llava", ROWS)
    with torch.no_grad():
        found = compiled(vision.tiny("llava"), plan, fallback="dense")(**inputs)
        dense = vision.tiny("llava")(**inputs)
    assert (found.logits - dense.logits)[inputs["attention_mask"].bool()].abs().max() < 1e-10
    assert "before block 0" in str(compilations()[-1].refusal)
    with pytest.raises(BackendCompilerFailed, match="a stage before block 0"), torch.no_grad():
        compiled(vision.tiny("llava"), plan)(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_later_turn_with_padding(name: str) -> None:
    """It keeps its tokens, and nothing sees its padding."""
    fast = torch.compile(vision.tiny(name), backend="tokprune", options={"plan": PLAN, "target": "eager"})
    first = vision.prompt(name, ROWS)
    reference = Reference(name, PLAN, first["input_ids"].shape[1])
    with torch.no_grad():
        cache = fast(**first, **positions(name, first["attention_mask"])).past_key_values
    inputs = longer(name, first, torch.tensor([[7, 8, 9], [0, 11, 12], [0, 0, 13]]))
    inputs["attention_mask"] = inputs["attention_mask"] * (inputs["input_ids"] != 0)
    for new in (3, 1):
        mask = inputs["attention_mask"]
        given = {"input_ids": inputs["input_ids"][:, -new:], "attention_mask": mask}
        given |= {k: v[:, -new:] for k, v in positions(name, mask).items()}
        exact = reference.logits(inputs)
        with torch.no_grad(), oracle.float64_softmax():
            found = fast(**given, past_key_values=cache)
        assert (found.logits[:, -1] - exact).abs().max() < 1e-10
        inputs = longer(name, inputs, exact.argmax(-1, keepdim=True))


class TestRefused:
    def test_drafted_tokens(self) -> None:
        fast = compiled(vision.tiny("llava"))
        with pytest.raises(RefusalError, match="logits of its last 3 tokens"), torch.no_grad():
            fast(**vision.prompt("llava", ROWS), logits_to_keep=3, use_cache=True)

    def test_ids_that_never_occur(self, caplog: pytest.LogCaptureFixture) -> None:
        plan = PrunePlan(PLAN.stages, PLAN.scorer, Protect(only_ids=(77,)))
        fast = compiled(vision.tiny("llava"), plan)
        with torch.no_grad():
            for _ in range(2):
                fast(**vision.prompt("llava", [[12]]))
        assert caplog.messages == [
            "No token of the prompt has one of the ids of Protect.only_ids, [77]: nothing of it is pruned."
        ]

    def test_a_model_that_names_no_image_token(self) -> None:
        model = vision.tiny("llava")
        model.config.image_token_id = None
        with pytest.raises(PlanError, match=r"does not say which token stands for an image .*Protect\(only_ids="):
            compiled(model)

    def test_one_method(self) -> None:
        model = vision.tiny("llava")
        with pytest.raises(OptionError, match=r"Compile the model, model\.compile.* not its forward\(\)\."):
            torch.compile(model.forward, backend="tokprune", options={"plan": PLAN})

    @pytest.mark.parametrize("options", [{"decode": {"every": 4, "keep": 0.5}}, {"later_turns": True}])
    def test_options_for_language_models(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=f"The option '{next(iter(options))}' is for language models alone"):
            compiled(vision.tiny("llava"), **options)

    def test_a_segment(self) -> None:
        plan = PrunePlan(PLAN.stages, PLAN.scorer, Protect(segment="first"))
        with pytest.raises(PlanError, match="protects a segment of a pair"):
            compiled(vision.tiny("llava"), plan)

    def test_merging(self) -> None:
        with pytest.raises(PlanError, match='Say leave="drop" for each stage'):
            compiled(vision.tiny("llava"), PrunePlan([Stage(1, 0.5, leave="merge")], PLAN.scorer))

    def test_embeddings_without_ids(self) -> None:
        fast = compiled(vision.tiny("llava"))
        with pytest.raises(RefusalError, match="without input_ids"), torch.no_grad():
            fast(inputs_embeds=torch.zeros(1, 5, 32, dtype=torch.float64))

    def test_a_text_model(self) -> None:
        plan = PrunePlan(PLAN.stages, PLAN.scorer, Protect(only_ids=(7,)))
        with pytest.raises(PlanError, match="only tokens of some ids may leave"):
            prune(zoo.tiny("llama", "causal", use_cache=False), plan, {"input_ids": torch.randint(5, 60, (2, 9))})
