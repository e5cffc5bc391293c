"""What `generate()` refuses, by its true reason and before a token is produced, whatever a graph shows first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sweep.models import build
from test_generation import compiled, decoder, generated, left_padded, prompts

from prunepass.errors import RefusalError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
WINDOW = {"sliding_window": 9}


def refused(model: Any, message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(Exception, match=message) as caught:
        generated(compiled(model), *args, **options)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), RefusalError)


@pytest.mark.parametrize(
    "model",
    [
        lambda: decoder("llama"),
        lambda: decoder("mistral", **WINDOW),
        pytest.param(lambda: decoder("gemma3", num_hidden_layers=4, **WINDOW), marks=pytest.mark.slow),
    ],
    ids=["llama", "mistral", "gemma3"],
)
@pytest.mark.parametrize("length", [pytest.param(6, marks=pytest.mark.slow), 17], ids=["short", "long"])
def test_a_static_cache(model: Callable[[], Any], length: int) -> None:
    """With or without a window, shorter than it or longer, padded or not."""
    ids, mask = left_padded([length, length - 3])
    for given in (None, mask):
        refused(model(), "key-value cache of fixed size", ids, attention_mask=given, cache_implementation="static")


def test_drafted_tokens_in_a_window() -> None:
    ids = prompts(1, 8, seed=2).repeat(1, 3)  # so that there is something to look up
    refused(decoder("mistral", **WINDOW), "without an assistant", ids, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", ["falcon", pytest.param("bloom", marks=pytest.mark.slow)])
def test_attention_in_code_of_its_own(name: str) -> None:
    """Fused or spelled out: masks of later calls are made in the model, which nothing here sees."""
    refused(build(name, use_cache=True), "in code of its own|spells its attention out", prompts(1, 17))
