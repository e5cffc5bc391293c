"""A pruned module among other modules: moved, cast, copied, put into a pipeline, called with other inputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from runtimes import bert, text
from torch import Tensor

import prunepass
import zoo
from prunepass import PrunedModule, PrunePlan, Stage
from prunepass.errors import OptionError, RefusalError
from vocabulary import tiny_tokenizer

PLAN = PrunePlan([Stage(1, "1/2")], "norm")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def module() -> PrunedModule:
    made = prunepass.prune(bert(num_layers=2), PLAN, text(2, 9))
    assert isinstance(made, PrunedModule)
    return made


def state(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(**inputs).last_hidden_state
    return found


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_another_dtype_is_refused(module: PrunedModule, cast: str) -> None:
    with pytest.raises(OptionError, match=r"traced in float32 on cpu.*Cast or move the original model first"):
        getattr(module, cast)()
    assert module.dtype == torch.float32


def test_another_device_is_refused(module: PrunedModule) -> None:
    with pytest.raises(OptionError, match="float32 on meta"):
        module.to("meta")
    assert module.device == torch.device("cpu")


def test_the_same_dtype_and_device_change_nothing(module: PrunedModule) -> None:
    before = state(module, text(2, 9))
    assert module.to("cpu").float().to(torch.float32) is module
    assert torch.equal(state(module, text(2, 9)), before)


def test_a_model_that_was_cast_after_pruning_is_noticed() -> None:
    model = bert(num_layers=2)
    module = prunepass.prune(model, PLAN, text(2, 9))
    model.half()
    with pytest.raises(OptionError, match=r"traced in float32 on cpu.*float16 on cpu"):
        module(**text(2, 9))


def test_a_copy_has_weights_of_its_own(module: PrunedModule) -> None:
    inputs = text(3, 20)
    before = state(module, inputs)
    twin = copy.deepcopy(module)
    assert torch.equal(state(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(state(module, inputs), before)
    changed = state(twin, inputs)
    assert not torch.allclose(changed, before, atol=1e-2)
    with torch.no_grad():
        exported = twin.exported.module(check_guards=False)(**inputs).last_hidden_state
    torch.testing.assert_close(exported, changed)


def test_pickling_is_refused(module: PrunedModule) -> None:
    with pytest.raises(OptionError, match="cannot be pickled"):
        pickle.dumps(module)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16, torch.float64])
def test_masks_of_any_dtype(module: PrunedModule, dtype: torch.dtype) -> None:
    inputs = text(3, 20)
    expected = state(module, inputs)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(state(module, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_pruning_with_masks_of_any_dtype(module: PrunedModule, dtype: torch.dtype) -> None:
    example = text(2, 9)
    example["attention_mask"] = example["attention_mask"].to(dtype)
    other = prunepass.prune(bert(num_layers=2), PLAN, example)
    inputs = text(3, 20)
    expected = state(module, inputs)
    assert torch.equal(state(other, inputs), expected)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(state(other, inputs), expected)


def test_a_mask_or_positions_of_one_row_stand_for_all() -> None:
    example = text(5, 9)
    example["position_ids"] = torch.arange(9)[None]
    example["attention_mask"] = example["attention_mask"][:1]
    module = prunepass.prune(bert(num_layers=2), PLAN, example)
    inputs = text(3, 20)
    short = {**inputs, "attention_mask": inputs["attention_mask"][:1], "position_ids": torch.arange(20).flip(0)[None]}
    long = {**inputs, **{k: short[k].repeat(3, 1) for k in ("attention_mask", "position_ids")}}
    assert torch.equal(state(module, short), state(module, long))
    with torch.no_grad():
        plain = prunepass.prune(bert(num_layers=2), PLAN, {k: v[:2] for k, v in long.items()})
    assert torch.equal(state(plain, long), state(module, long))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_mask": torch.ones(3, 19)}, r"attention_mask has the shape \[3, 19\], but axis 1 must be 20"),
        ({"attention_mask": torch.ones(2, 20)}, r"attention_mask has the shape \[2, 20\], but axis 0 must be 3"),
        ({"attention_mask": torch.ones(3, 1, 20, 20)}, r"attention_mask has the shape .* 2 axes \(\[batch, length\]\)"),
        ({"input_ids": torch.ones(3, 20)}, r"input_ids is float32, but the model was pruned with int64"),
        ({"input_ids": torch.ones(20, dtype=torch.int64)}, r"input_ids has the shape \[20\]"),
        ({"input_ids": [[1, 2]]}, "gives 3 values, but the model was pruned with 2"),
        ({"attention_mask": None}, "attention_mask must be a tensor|traced with"),
        ({"token_type_ids": torch.zeros(3, 20, dtype=torch.int64)}, "traced with input_ids, attention_mask"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(module: PrunedModule, changed: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        module(**{**text(3, 20), **changed})
    with pytest.raises(OptionError):
        module(text(3, 20)["input_ids"])


def test_masks_of_four_axes_are_refused_at_pruning() -> None:
    example = {**text(2, 9), "attention_mask": torch.ones(2, 1, 9, 9)}
    with pytest.raises(RefusalError, match="4 dimensions"):
        prunepass.prune(bert(num_layers=2), PLAN, example)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_in_another_dtype_are_refused(dtype: torch.dtype) -> None:
    model = bert(num_layers=2)
    example = text(2, 9)
    example["inputs_embeds"] = model.embeddings.word_embeddings(example.pop("input_ids")).detach()
    module = prunepass.prune(model, PLAN, example)
    example["inputs_embeds"] = example["inputs_embeds"].to(dtype)
    with pytest.raises(OptionError, match=r"inputs_embeds is .*float16, but the model was pruned with float32"):
        module(**example)


def test_a_pipeline_takes_a_pruned_model() -> None:
    from transformers import pipeline

    tokenizer = tiny_tokenizer()
    model = zoo.tiny("bert", "sequence", dtype=torch.float32)
    texts = ["one two three four five six", "seven eight"]
    encoded = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    module = prunepass.prune(model, PLAN, encoded)
    pipe = pipeline("text-classification", model=module, tokenizer=tokenizer, device=-1)
    found = [r["score"] for r in pipe(texts, batch_size=2)]
    with torch.no_grad():
        expected = module(**encoded).logits.softmax(-1).max(-1).values
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
