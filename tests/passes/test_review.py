"""Models and calls made to be got wrong: each is right or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import harness
import prunepass
import toys
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError, RefusalError
from prunepass.pipeline import kept_tokens

PLAN = PrunePlan((Stage(1, 0.5), Stage(2, 0.3)), "norm")


class Handmade(nn.Module):
    """Attention over heads ``[B, H, S, d]`` whose probabilities are applied by ``apply``."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], dim: int = -1) -> None:
        super().__init__()
        self.apply_to, self.dim = apply, dim
        self.qkv = nn.Linear(toys.WIDTH, 3 * toys.WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, toys.HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).masked_fill(~mask, -1e9).softmax(self.dim)
        return self.apply_to(weights, v).transpose(1, 2).reshape(b, s, -1)


def encoder(attention: Callable[[], nn.Module]) -> nn.Module:
    model = toys.encoder()
    model.blocks[2].attention = attention().double()
    return model


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(lambda: Handmade(lambda p, v: (p + 0.05) @ v), id="smoothed"),
        pytest.param(lambda: Handmade(lambda p, v: (1 - p) @ v), id="inverted"),
        pytest.param(lambda: Handmade(lambda p, v: p.mT @ v), id="transposed"),
        pytest.param(lambda: Handmade(lambda p, v: torch.einsum("bhqk,bhqd->bhkd", p, v)), id="einsum over queries"),
        pytest.param(lambda: Handmade(lambda p, v: p @ v, dim=-2), id="softmax over queries"),
    ],
)
def test_weights_that_do_not_vanish_at_hidden_keys_are_refused(attention: Callable[[], nn.Module]) -> None:
    with pytest.raises(RefusalError, match=r"blocks\.2\.attention"):
        prunepass.prune(encoder(attention), PLAN, harness.example())


@pytest.mark.parametrize(
    "scramble",
    [
        pytest.param(lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[1]).mT, id="reshape for transpose"),
        pytest.param(lambda x: x.repeat(1, 2, 1).view(*x.shape[:2], -1)[..., : toys.WIDTH], id="repeat"),
        pytest.param(lambda x: x.flatten(0, 1).view(x.shape[1], x.shape[0], -1).transpose(0, 1), id="rows for columns"),
    ],
)
def test_views_that_mix_tokens_are_refused(scramble: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RefusalError, match=r"blocks\.2\.extra"):
        prunepass.prune(toys.encoder(lambda: toys.Apply(scramble)), PLAN, harness.example())


def test_a_pruned_model_is_called_as_the_model_is() -> None:
    example, x = harness.example(), zoo.batch([9, 5])
    ids, mask = x["input_ids"], x["attention_mask"]
    by_name = prunepass.prune(toys.encoder(layers=3), PLAN, example)
    by_place = prunepass.prune(toys.encoder(layers=3), PLAN, (example["input_ids"], example["attention_mask"]))
    wanted = harness.run(by_name, x)
    for model in (by_name, by_place):
        assert torch.equal(model(ids, mask), wanted)
        assert torch.equal(model(ids, attention_mask=mask), wanted)
        assert torch.equal(model(attention_mask=mask, input_ids=ids), wanted)
        with pytest.raises(OptionError, match=r"traced with input_ids, attention_mask.*called with input_ids\."):
            model(ids)
        with pytest.raises(OptionError, match="token_type_ids"):
            model(ids, mask, token_type_ids=ids)


def test_kept_tokens_takes_what_a_tokenizer_gives() -> None:
    model, example = toys.encoder(layers=3), harness.example()
    one, two = kept_tokens(model, PLAN, BatchEncoding(example)), kept_tokens(model, PLAN, example)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert kept_tokens(model, PLAN, example["input_ids"])[0].shape == example["input_ids"].shape


def test_plans_that_restore_otherwise_are_not_equal() -> None:
    """torch.compile takes a graph that it has for an equal plan."""
    assert PrunePlan(PLAN.stages) != PrunePlan(PLAN.stages, restore="zeros")


def test_a_pruned_graph_is_not_pruned_again() -> None:
    source = harness.captured("bert").graph_module
    given = str(source.graph)
    once = prunepass.prune(source, PLAN)
    with pytest.raises(RefusalError, match="pruned already"):
        prunepass.prune(once, PLAN)
    assert str(source.graph) == given


class TellsNoOne(nn.Module):
    """Takes an attention mask, and uses it on its output only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids, torch.ones_like(input_ids)) * attention_mask[..., None]


def test_a_mask_that_attention_does_not_use_is_refused() -> None:
    with pytest.raises(RefusalError, match="attends to padding"):
        prunepass.prune(TellsNoOne(), PLAN, harness.example())


def test_pickling_a_pruned_module_says_what_to_do() -> None:
    module = prunepass.prune(zoo.tiny("bert"), PLAN, harness.example())
    with pytest.raises(OptionError, match=r"prunepass\.export"):
        pickle.dumps(module)
