"""Example inputs that a model cannot take: one sentence that names what to pass, never torch's own error."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunepass
import toys
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import CaptureError, OptionError

PLAN = PrunePlan((Stage(1, 0.5),), "norm")
IDS = zoo.batch([11, 7])["input_ids"]
MASK = zoo.batch([11, 7])["attention_mask"]

WRONG: dict[str, tuple[Any, str]] = {
    "text": ("some text", r"not text.*tokenizer\("),
    "texts": (["one", "two"], r"is text.*tokenizer\("),
    "text by name": ({"input_ids": "some text"}, r"'input_ids' is text"),
    "a number": (3, r"not int.*tokenizer\("),
    "nothing": ({}, r"no tensor of shape"),
    "another name": ({"input_idz": IDS}, r"no input 'input_idz'.*takes input_ids, attention_mask"),
    "a number as name": ({3: IDS}, r"names as keys, not 3"),
    "lists": ({"input_ids": IDS.tolist()}, r"'input_ids' is a list.*return_tensors='pt'"),
    "lists by position": ([IDS.tolist()], r"'input 0' is a list"),
    "numpy": ({"input_ids": IDS.numpy()}, r"'input_ids' is a numpy array"),
    "floats": ({"input_ids": IDS.float()}, r"'input_ids' is torch.float32.*integers"),
    "one axis": ({"input_ids": IDS[0]}, r"'input_ids' has shape \[11\].*input_ids\[None\]"),
    "no rows": ({"input_ids": IDS[:0]}, r"\[0, 11\]: no rows"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"\[2, 0\]: no tokens"),
    "another device": ({"input_ids": IDS.to("meta")}, r"'input_ids' is on meta and the model on cpu"),
    "a mask of another length": ({"input_ids": IDS, "attention_mask": MASK[:, :5]}, r"\[2, 5\].*\[2, 11\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_inputs_that_cannot_be_are_named(kind: str) -> None:
    given, message = WRONG[kind]
    with pytest.raises(OptionError, match=message):
        prunepass.prune(toys.encoder(), PLAN, given)


@pytest.mark.parametrize("verb", [prunepass.explain, prunepass.prune])
def test_more_tokens_than_the_model_has_positions_for(verb: Any) -> None:
    long = torch.ones(2, 65, dtype=torch.int64)
    with pytest.raises(OptionError, match=r"65 tokens a row.*64 positions.*max_length=64"):
        verb(zoo.tiny("bert"), PLAN, {"input_ids": long})


def test_ids_of_another_tokenizer() -> None:
    with pytest.raises(OptionError, match=rf"holds the id {zoo.VOCABULARY}.*{zoo.VOCABULARY} tokens"):
        prunepass.explain(zoo.tiny("bert"), PLAN, {"input_ids": IDS.clone().fill_(zoo.VOCABULARY)})


def test_inputs_that_the_model_itself_does_not_take() -> None:
    """Names hide behind ``**kwargs``, so only a run tells."""
    with pytest.raises(
        CaptureError, match=r"do not run through BertModel itself.*input_idz: int64 \[2, 11\].*input_ids"
    ):
        prunepass.prune(zoo.tiny("bert"), PLAN, {"input_idz": IDS})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = toys.encoder()

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.encoder(input_ids)
        return x if float(x.sum()) > 0 else -x


def test_a_model_that_runs_but_cannot_be_traced_says_that() -> None:
    with pytest.raises(CaptureError, match=r"The model itself runs.*branches on a value.*test_example_inputs"):
        prunepass.prune(Branching(), PLAN, {"input_ids": IDS})


@pytest.mark.parametrize(
    "given",
    [
        UserDict({"input_ids": IDS, "attention_mask": MASK}),
        {"input_ids": IDS, "attention_mask": None},
        {"input_ids": IDS[:, :1]},
        {"input_ids": torch.cat([IDS, IDS]), "attention_mask": torch.ones_like(IDS[:1])},
        IDS,
    ],
)
def test_other_ways_of_giving_inputs_are_fine(given: Any) -> None:
    pruned = prunepass.prune(toys.encoder(), PLAN, given)
    expected = prunepass.prune(toys.encoder(), PLAN, {"input_ids": IDS, "attention_mask": MASK})
    full = torch.ones_like(MASK)
    named = isinstance(given, (dict, UserDict))
    x: dict[str, Any] = {"input_ids": IDS}
    if named and "attention_mask" in given:
        x["attention_mask"] = None if given["attention_mask"] is None else full
    with torch.no_grad():
        torch.testing.assert_close(pruned(**x), expected(input_ids=IDS, attention_mask=full), rtol=0, atol=1e-12)
