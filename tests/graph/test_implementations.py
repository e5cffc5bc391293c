"""Attention that no pass can read is refused by name; torch.nn's encoder is pruned, or refused for its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtimes import bert, text
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import RefusalError

PLAN = PrunePlan([Stage(1, 0.5)], "norm", protect=Protect(first=1, last=1))
OPTIONS = {"plan": PLAN, "target": "eager"}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def refusal(call: Any) -> str:
    with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011  # Dynamo wraps it
        call()
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, RefusalError)
    return str(error)


NAMES = ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "owner/kernel"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_implementations(name: str) -> None:
    model = bert()
    model.config._attn_implementation_internal = name
    message = refusal(lambda: prunepass.prune(model, PLAN, text(2, 9)))
    assert repr(name) in message
    assert 'attn_implementation="sdpa"' in message


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager"])
def test_in_generate_before_a_token(name: str) -> None:
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2, vocab_size=97
    )
    model = LlamaForCausalLM(config).eval()
    model.config._attn_implementation_internal = name
    model.compile(backend="tokprune", options=OPTIONS)
    message = refusal(lambda: model.generate(**text(2, 9), max_new_tokens=2))
    assert repr(name) in message
    assert 'attn_implementation="sdpa"' in message


def test_a_step_of_a_decoder_whose_encoder_ran_before() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=97, decoder_start_token_id=0)
    model, inputs = T5ForConditionalGeneration(config).eval(), text(2, 9)
    fast = torch.compile(model, backend="tokprune", options=OPTIONS)  # its generate() is that of the model inside
    states, start = model.get_encoder()(**inputs), torch.zeros(2, 1, dtype=torch.int64)
    message = refusal(lambda: fast(encoder_outputs=states, decoder_input_ids=start, use_cache=False))
    assert "model.get_encoder().compile" in message


def encoder(batch_first: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)  # type: ignore[no-any-return]  # torch.nn's


X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="traced by torch 2.11, it holds a view that its own strides do not allow, which is refused",
)
class TestTorchsEncoder:
    @torch.no_grad()
    def test_is_pruned_and_a_row_does_not_depend_on_its_padding(self) -> None:
        model, mask = Padded(), torch.ones(2, 9, dtype=torch.int64)
        mask[0, 6:] = 0
        fast = torch.compile(model, backend="tokprune", options=OPTIONS)
        got, dense = fast(X, attention_mask=mask), model(X, mask)
        alone = fast(X[:1, :6].clone(), attention_mask=mask[:1, :6].clone())
        torch.testing.assert_close(got[:1, :6], alone, atol=1e-5, rtol=0)
        assert (got[1] - dense[1]).abs().max() > 1e-2
        bare = torch.compile(encoder(), backend="tokprune", options=OPTIONS)(X)
        torch.testing.assert_close(bare[1], got[1], atol=1e-5, rtol=0)

    def test_refuses_what_would_be_read_wrongly(self) -> None:
        padding = torch.zeros(2, 9, dtype=torch.bool)
        fast = torch.compile(encoder(), backend="tokprune", options=OPTIONS)
        assert "True at padding" in refusal(lambda: fast(X, src_key_padding_mask=padding))
        assert "[length, length]" in refusal(lambda: fast(X, mask=torch.zeros(9, 9, dtype=torch.bool), is_causal=False))
        rows = torch.compile(encoder(batch_first=False), backend="tokprune", options=OPTIONS)
        assert "batch_first=True" in refusal(lambda: rows(X))
        causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert "Dynamo made no graph" in refusal(
            lambda: fast(X, mask=causal)
        )  # whether it is causal is looked up in it
