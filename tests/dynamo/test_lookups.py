"""Tokens and positions outside of their tables are told by name, whatever the runtime does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.dynamo.lookups import Lookups
from prunepass.errors import OptionError
from prunepass.graph.capture import capture_module

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
PLAN = PrunePlan([Stage(1, 0.5)], "norm", Protect(first=1, last=1))


def compiled(model: nn.Module, target: str) -> Any:
    if target != "eager":
        pytest.importorskip(target)
    return torch.compile(model, backend="tokprune", dynamic=True, options={"plan": PLAN, "target": target})


def ids(length: int) -> Tensor:
    return torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(0))


def roberta() -> nn.Module:
    return zoo.tiny("roberta", dtype=torch.float32, max_position_embeddings=26, num_hidden_layers=2)


@pytest.mark.parametrize("target", ["eager", "openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_text_longer_than_the_positions(target: str) -> None:
    fast = compiled(roberta(), target)
    with torch.no_grad():
        before = fast(input_ids=ids(24), attention_mask=torch.ones_like(ids(24)))[0]
        with pytest.raises(OptionError, match=r"position 31, .*position_embeddings\) has 26 rows.*truncation=True"):
            fast(input_ids=ids(30), attention_mask=torch.ones_like(ids(30)))
        again = fast(input_ids=ids(24), attention_mask=torch.ones_like(ids(24)))[0]
    assert torch.equal(before, again)


@pytest.mark.parametrize("target", ["eager", pytest.param("openvino", marks=pytest.mark.slow)])
def test_tokens_of_another_vocabulary(target: str) -> None:
    model = zoo.tiny("llama", dtype=torch.float32, num_hidden_layers=2)
    rows = model.get_input_embeddings().weight.shape[0]
    given = ids(8)
    given[1, 3] = rows
    message = rf"A token id of input_ids is {rows}, .*embed_tokens\) has rows 0 to {rows - 1}\. Use the tokenizer"
    with torch.no_grad(), pytest.raises(OptionError, match=message):
        compiled(model, target)(input_ids=given, use_cache=False)


@pytest.mark.parametrize("target", ["eager", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_prompt_and_steps_beyond_the_context(target: str) -> None:
    model = zoo.tiny("gpt2", "causal", dtype=torch.float32, n_positions=16, n_layer=2)
    model.forward = compiled(model.forward, target)
    model.generation_config.pad_token_id = 0
    with pytest.raises(OptionError, match=r"position \d+, .*wpe\) has 16 rows"):
        model.generate(ids(20), max_new_tokens=2, do_sample=False)
    with pytest.raises(OptionError, match=r"position 16, .*wpe\) has 16 rows"):
        model.generate(ids(14), max_new_tokens=6, do_sample=False)


def test_which_tables_are_looked_at() -> None:
    """Those of ids, and of positions and types that are computed from them; each with its rows."""
    given = {"input_ids": ids(9), "attention_mask": torch.ones_like(ids(9))}
    lookups = Lookups.of(capture_module(roberta(), given).graph_module)
    assert lookups is not None
    rows = {module.split(".")[-1]: rows for _, module, rows in lookups._tables}
    assert rows == {"word_embeddings": 97, "token_type_embeddings": 2, "position_embeddings": 26}
    lookups.check(tuple(given.values()))  # nothing is outside
    given["input_ids"][0, 0] = -1
    with pytest.raises(OptionError, match="input_ids is -1"):
        lookups.check(tuple(given.values()))


def graph_of(forward: Any, *given: Tensor) -> Any:
    """As Dynamo writes it."""
    found = []

    def keep(gm: Any, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch.compile(forward, backend=keep)(*given)
    return found[0]


def test_arguments_by_name() -> None:
    table = torch.randn(5, 3)
    lookups = Lookups.of(graph_of(lambda x: nn.functional.embedding(input=x, weight=table), torch.tensor([[1, 4]])))
    assert lookups is not None
    assert [rows for _, _, rows in lookups._tables] == [5]


@pytest.mark.parametrize("how", ["slice", "method"])
def test_what_is_written_in_place_is_left_alone(how: str) -> None:
    """Computed once more beside the graph, it would be written twice, or not at all."""
    table = torch.randn(5, 3)

    def forward(x: Tensor) -> Tensor:
        places = x + 0
        if how == "slice":
            places[:, 0] = 0
        else:
            places.clamp_(max=4)
        return nn.functional.embedding(places, table)

    assert Lookups.of(graph_of(forward, torch.tensor([[9, 2]]))) is None
