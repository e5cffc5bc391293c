"""Where the last layers take keys and values from an earlier one, prompt tokens that nothing reads are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep.models import build
from torch import Tensor

import hooks
import oracle
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.cost import FlopCounter
from prunepass.dynamo.backend import compilations
from prunepass.graph.capture import ensure_aten
from prunepass.graph.ops import SDPA, attention_arguments

NOTHING = PrunePlan(())
PROMPT, NEW, LAYERS = 23, 4, 6
#: the last two layers attend to the keys of layers 2 and 3
SHARED: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "use_cache": True,
}
#: of the sparse one, which takes long to trace, the last two of four
SPARSE: dict[str, Any] = {
    **SHARED,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.9, 0.0] * 2,
    "intermediate_size": [40] * 4,
}
MODELS = {
    "gemma3n": ("gemma3n_text", SPARSE),
    "gemma4": ("gemma4_text", SHARED),
    "gemma3": ("gemma3_text", {"use_cache": True}),
}
Call = tuple[Tensor, list[Tensor]]


def recorded(model: Any) -> list[Call]:
    """What each call of a model gives from now on: logits [B, 1, V], and the keys and values of its cache."""
    calls: list[Call] = []
    inner = model._compiled_call_impl or model.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        layers = [layer for layer in out.past_key_values.layers if layer.keys is not None]
        calls.append((out.logits, [x.clone() for layer in layers for x in (layer.keys, layer.values)]))
        return out

    model._compiled_call_impl = call
    return calls


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows, the second with padding on the left."""
    ids = torch.randint(5, 60, (2, PROMPT), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ids[1, :6] = zoo.PAD
    return ids, mask


def generated(model: Any) -> tuple[Tensor, list[Call]]:
    calls = recorded(model)
    ids, mask = prompt()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": zoo.PAD, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **options), calls


def compiled(name: str, plan: PrunePlan, *, dynamic: bool | None = None) -> Any:
    kind, options = MODELS[name]
    model = build(kind, **options)
    torch._dynamo.reset()
    model.compile(backend="tokprune", options={"plan": plan, "target": "eager"}, dynamic=dynamic)
    return model


def queries() -> list[bool]:
    """For each attention of the prompt's graph, whether it has a query for each of its keys."""
    result = compilations()[0].result
    assert result is not None
    found = [attention_arguments(n) for n in result.graph_module.graph.find_nodes(op="call_function", target=SDPA)]
    # by their expressions: comparing open sizes would fix them
    return [str(x["query"].meta["val"].shape[2]) == str(x["key"].meta["val"].shape[2]) for x in found]


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_without_stages_logits_and_caches_are_those_of_the_dense_model(name: str) -> None:
    kind, options = MODELS[name]
    with oracle.float64_softmax():
        tokens, dense = generated(build(kind, **options))
        found, exact = generated(compiled(name, NOTHING, dynamic=True))
    assert torch.equal(found, tokens)
    assert len(exact) == len(dense) == NEW
    for (logits, caches), (expected, others) in zip(exact, dense, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        assert len(caches) == len(others) == 2 * (options["num_hidden_layers"] - 2)
        for one, other in zip(caches, others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert queries()[-2:] == [False, False]
    assert queries()[0]


def test_the_flops_left_out_are_counted() -> None:
    graphs: list[Any] = []

    class Target:
        def lower(self, gm: Any, inputs: Any, *, config: Any = None) -> Any:
            graphs.append(gm)
            return gm

    kind, options = MODELS["gemma3n"]
    ids, mask = prompt()
    for target in ("tokprune", "dense"):
        model = build(kind, **options)
        torch._dynamo.reset()
        if target == "tokprune":
            model.compile(backend=target, options={"plan": NOTHING, "target": Target()})
        else:
            model.compile(backend=lambda gm, _: graphs.append(gm) or gm)
        with torch.no_grad(), oracle.float64_softmax():
            model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    assert len(graphs) == 2
    flops = [FlopCounter(ensure_aten(gm), batch=2, length=PROMPT).total(2, PROMPT) for gm in graphs]
    assert flops[0] < 0.8 * flops[1]


def test_a_model_whose_layers_all_have_keys_of_their_own_stays_as_it_is() -> None:
    ids, mask = prompt()
    with torch.no_grad(), oracle.float64_softmax():
        compiled("gemma3", NOTHING)(input_ids=ids, attention_mask=mask)
    assert all("hoist" not in c.result.changes for c in compilations() if c.result is not None)
    assert all(queries())


PLAN = PrunePlan((Stage(1, 0.7), Stage(2, 0.4)), "norm", Protect(first=1, last=1))


@pytest.mark.parametrize("again", [False, True])
def test_a_plan_prunes_the_layers_before_as_the_masked_model_does(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 leaves out what its last layers do not read by itself, and has an embedding for each layer beside its
    stream. Once a pruned model has run in the process, calls look for empty slots in what may be a cache."""
    monkeypatch.setattr("prunepass.generation.attention._empty_slots", again)
    kind, options = MODELS["gemma4"]
    exact = build(kind, **options | {"use_cache": False})
    layers = hooks.layers_of(exact, LAYERS)
    _, mask = prompt()
    with oracle.float64_softmax():
        rows, calls = generated(compiled("gemma4", PLAN))
        for step, (logits, _) in enumerate(calls):
            x = {"input_ids": rows[:, : PROMPT + step], "attention_mask": torch.cat([mask, mask.new_ones(2, step)], 1)}
            expected = hooks.run_hooked(exact, layers, PLAN, zoo.with_positions(x), prompt=PROMPT).output
            torch.testing.assert_close(logits[:, -1], expected.logits[:, -1], rtol=0, atol=1e-9)
    assert len(calls) == NEW
    assert not any(queries()[3:])
