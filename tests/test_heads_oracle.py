"""The hook oracle on every architecture with every head that it has: `hooks.run_hooked` masks the unmodified model, and
a pruned graph must give the same outputs at every live position, pruned ones too, with drawn weights of all norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import hooks
import oracle
import prunepass
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import RefusalError

TOLERANCE = 1e-10
# These compute attention in float32 by an explicit cast.
LOOSER = {"gptj": 1e-5, "codegen": 1e-5}
PLAN = PrunePlan((Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3)), "norm")
# Not built of layers: its parts stand in lists by kind.
NO_LAYERS = {"xlm"}
# Their head counts end tokens by an operator whose result's size depends on the ids: refused.
REFUSED = [(name, "sequence") for name in ("bart", "mbart", "mvp", "plbart")]
CASES = [
    (name, head)
    for name in (*zoo.SPECIES, *zoo.ENCODER_DECODERS)
    if name not in NO_LAYERS
    for head in zoo.heads_of(name)
    if (name, head) not in REFUSED
]
EVERY_DAY = {
    ("bert", "masked"),
    ("roberta", "question"),
    ("albert", "token"),
    ("electra", "sequence"),
    ("mobilebert", "masked"),
    ("modernbert", "token"),
    ("gpt2", "causal"),
    ("gptj", "causal"),
    ("gpt_neox", "base"),
    ("phi", "causal"),
    ("llama", "sequence"),
    ("gemma2", "causal"),
    ("cohere", "causal"),
    ("bart", "seq2seq"),
    ("pegasus", "seq2seq"),
    ("t5", "seq2seq"),
}


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def text(name: str, lengths: list[int], decoder: int | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Rows that end with id 3, which classifiers of encoder-decoders look for; for a decoder ids of its own."""
    x = zoo.batch(lengths, seed=seed, high=60)
    for row, n in enumerate(lengths):
        x["input_ids"][row, n - 1] = 3
    if decoder and name in zoo.ENCODER_DECODERS:
        x["decoder_input_ids"] = zoo.batch([decoder] * len(lengths), seed=seed + 1)["input_ids"]
    return x


def worst(module: Any, model: Any, x: dict[str, Tensor]) -> float:
    expected = hooks.run_hooked(model, hooks.layers_of(model, zoo.LAYERS), PLAN, x).output
    return harness.difference(harness.run(module, x), expected, x["attention_mask"].bool())


@pytest.mark.parametrize(
    ("name", "head"), [pytest.param(*case, marks=() if case in EVERY_DAY else pytest.mark.slow) for case in CASES]
)
def test_every_head_of_every_architecture(name: str, head: str) -> None:
    decoder = None if head in ("sequence", "question") else 6
    options = {"num_labels": zoo.HIDDEN} if head == "token" else {}  # as many labels as a hidden state has numbers
    model = zoo.tiny(name, head, **options)
    pruned = prunepass.prune(model, PLAN, text(name, [11, 7], decoder and 5))
    x = text(name, [13, 9, 4], decoder)
    assert worst(pruned, model, x) < LOOSER.get(name, TOLERANCE)
    assert harness.difference(harness.run(model, x), harness.run(pruned, x), x["attention_mask"].bool()) > 1e-3


@pytest.mark.parametrize(
    ("name", "head"), [pytest.param(*case, marks=() if case[0] == "bart" else pytest.mark.slow) for case in REFUSED]
)
def test_heads_that_are_refused(name: str, head: str) -> None:
    with pytest.raises(RefusalError):
        prunepass.prune(zoo.tiny(name, head), PLAN, text(name, [11, 7]))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "bart" else pytest.mark.slow) for n in zoo.ENCODER_DECODERS]
)
def test_a_decoder_as_long_as_the_encoder_in_the_example(name: str) -> None:
    """Equal lengths say nothing: the graph must hold for other ones, and give what it gives when traced with those."""
    model = zoo.tiny(name)
    equal, other = (prunepass.prune(model, PLAN, text(name, [11, 7], n)) for n in (11, 5))
    for decoder in (6, 13, 20):
        x = text(name, [13, 9, 4], decoder)
        assert worst(equal, model, x) < TOLERANCE, decoder
        assert worst(other, model, x) < TOLERANCE, decoder


@pytest.mark.parametrize("name", ["bart", pytest.param("mvp", marks=pytest.mark.slow)])
def test_decoder_ids_made_of_the_encoders(name: str) -> None:
    """The model shifts its ids for the decoder, whose length is then truly the encoder's."""
    model = zoo.tiny(name)
    pruned = prunepass.prune(model, PLAN, text(name, [11, 7]))
    for lengths in ([13, 9, 4], [6], [20, 20]):
        x = text(name, lengths)
        assert worst(pruned, model, x) < TOLERANCE, lengths


def test_an_encoder_read_by_a_decoder_alone_is_restored() -> None:
    """Only logits are returned, whose length is the decoder's: the encoder's states are all read nevertheless."""

    class LogitsOnly(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Any:
            return self.inner(input_ids, attention_mask, decoder_input_ids).logits

    model = zoo.tiny("bart", "seq2seq")
    pruned = prunepass.prune(LogitsOnly(model), PLAN, text("bart", [11, 7], 5))
    x = text("bart", [13, 9, 4], 6)
    expected = hooks.run_hooked(model, hooks.layers_of(model, zoo.LAYERS), PLAN, x).output.logits
    assert float((harness.run(pruned, x) - expected).abs().max()) < TOLERANCE
