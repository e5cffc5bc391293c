"""Graphs that are a part of a model are refused where Dynamo splits it; modes, checkpoints, wrappers."""

from __future__ import annotations

import logging
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import toys
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.dynamo.backend import compilations
from prunepass.dynamo.parts import fixed_cache_blamed
from prunepass.errors import OptionError, RefusalError

FIRST = PrunePlan([Stage(0, 0.5)], "norm")
SECOND = PrunePlan([Stage(1, 0.5)], "norm")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: nn.Module, plan: PrunePlan = SECOND, **options: Any) -> Any:
    return torch.compile(model, backend="tokprune", options={"plan": plan, "target": "eager", **options})


def ids() -> Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def refused(fast: Any, message: str, **given: Any) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=message) as caught:
        fast(**given) if given else fast(ids())
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), RefusalError)


class Splitting(nn.Module):
    """A block that breaks Dynamo's graph before it runs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        torch._dynamo.graph_break()
        return self.block(x, mask)


class Halves(toys.Encoder):
    """An encoder that breaks Dynamo's graph after its second block."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.blocks[1](self.blocks[0](self.words(input_ids), None), None)
        torch._dynamo.graph_break()
        return self.blocks[3](self.blocks[2](x, None), None)


class Untraceable(toys.Encoder):
    """An encoder whose own ``forward`` Dynamo skips, so that it comes upon one block after the other."""

    @torch._dynamo.disable(recursive=False)
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, None)
        return x


def split(at: int, layers: int = 4) -> nn.Module:
    model = toys.encoder(layers=layers)
    model.blocks[at] = Splitting(model.blocks[at])
    return model


class TestParts:
    def test_a_split_model_is_refused_where_it_is_split(self) -> None:
        refused(compiled(Halves().double().eval()), r"test_dynamo_parts\.py:\d+: torch.compile splits the model here")

    def test_a_model_split_in_a_loop_is_not_pruned_block_by_block(self) -> None:
        for plan in (FIRST, SECOND):
            refused(compiled(split(2), plan), "could not trace Encoder.forward as a whole")

    def test_a_disabled_block_splits(self) -> None:
        model = toys.encoder(layers=4)
        model.blocks[3].forward = torch.compiler.disable(model.blocks[3].forward)  # type: ignore[method-assign]
        refused(compiled(model), "could not trace Encoder.forward as a whole")

    def test_blocks_are_not_pruned_one_by_one(self) -> None:
        model = Untraceable(layers=2).double().eval()
        refused(compiled(model, FIRST), r"could not trace Untraceable.forward")

    def test_a_split_model_runs_dense_on_request(self) -> None:
        model = split(2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(model, fallback="dense")(ids()), model(ids()))
        assert compilations()
        assert all(c.result is None for c in compilations())

    def test_hidden_states_of_a_first_call(self) -> None:
        plan = PrunePlan([Stage(1, 0.5)], "norm", Protect(last=1))
        model = zoo.tiny("llama", "causal", num_hidden_layers=2)
        refused(compiled(model, plan), "once before torch.compile", input_ids=ids(), output_hidden_states=True)

    def test_hidden_states_of_a_later_call(self) -> None:
        model = zoo.tiny("llama", "causal", num_hidden_layers=2)
        with torch.no_grad():
            model(input_ids=ids(), output_hidden_states=True)
            found = compiled(model)(input_ids=ids(), output_hidden_states=True)
        assert [tuple(x.shape) for x in found.hidden_states] == [(2, 9, zoo.HIDDEN)] * 3
        assert [bool(c.result and c.result.sites) for c in compilations()] == [True]


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        return checkpoint(self.block, x, mask, use_reentrant=False)


class TestCheckpoints:
    def model(self) -> nn.Module:
        model = toys.encoder(layers=3)
        model.blocks[1] = Checkpointed(model.blocks[1])
        return model

    def test_gradient_checkpointing_is_refused(self) -> None:
        with pytest.raises(Exception, match="gradient_checkpointing_disable") as caught:
            compiled(self.model())(ids())
        assert isinstance(caught.value.inner_exception, RefusalError)

    def test_gradient_checkpointing_runs_dense_on_request(self) -> None:
        model, twin = self.model(), self.model()
        compiled(model, fallback="dense")(ids()).square().sum().backward()
        twin(ids()).square().sum().backward()
        torch.testing.assert_close(model.words.weight.grad, twin.words.weight.grad)


class TestModes:
    def test_an_unknown_mode(self) -> None:
        fast = torch.compile(toys.encoder(layers=2), backend="tokprune", mode="fastest")
        with torch.no_grad(), pytest.raises(Exception, match="one of Inductor's, default, ") as caught:
            fast(ids())
        assert isinstance(caught.value.inner_exception, OptionError)

    def test_a_mode_is_handed_to_inductor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from prunepass.backends import inductor

        seen: list[Any] = []
        monkeypatch.setattr(inductor, "lower", lambda gm, x, *, config=None: seen.append(dict(config)) or gm)
        fast = torch.compile(toys.encoder(layers=4), backend="tokprune", mode="max-autotune-no-cudagraphs")
        with torch.no_grad():
            fast(ids())
        assert seen[0]["max_autotune"]
        plan = compilations()[0].plan
        assert plan is not None
        assert plan.stages == PrunePlan.default(4).stages


class Wrapper(nn.Module):
    """As PEFT's models are: ``generate`` is the inner model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


OPTIONS = {"plan": PrunePlan([Stage(1, 0.5)], "norm", Protect(last=1)), "target": "eager"}


class TestWrappers:
    def model(self) -> nn.Module:
        return zoo.tiny("llama", "causal", num_hidden_layers=2, use_cache=True, eos_token_id=None)

    def check(self, wrapper: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="prunepass"):
            torch.compile(wrapper, backend="tokprune", options=OPTIONS)
            wrapper.compile(backend="tokprune", options=OPTIONS)
        assert caplog.text.count("get_base_model().compile(") == 2
        wrapper.get_base_model().compile(backend="tokprune", options=OPTIONS)
        with torch.no_grad():
            wrapper.generate(input_ids=ids(), max_new_tokens=2, do_sample=False)
        assert sum(bool(c.result and c.result.sites) for c in compilations()) == 1

    def test_what_generates_by_its_inner_model_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        self.check(Wrapper(self.model()), caplog)

    def test_peft(self, caplog: pytest.LogCaptureFixture) -> None:
        peft = pytest.importorskip("peft")
        self.check(peft.get_peft_model(self.model(), peft.LoraConfig(target_modules=["q_proj"], r=2)), caplog)

    def test_other_models_say_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="prunepass"):
            torch.compile(self.model(), backend="tokprune", options=OPTIONS)
        assert not caplog.text


@pytest.mark.parametrize("scorer", ["norm", "random"])
@pytest.mark.parametrize("protect", [Protect(first=1), Protect(first=2, last=1)])
def test_a_block_alone_is_pruned_at_its_input(scorer: str, protect: Protect) -> None:
    block, x = toys.encoder(layers=2).blocks[0], torch.randn(2, 9, toys.WIDTH).double()
    plan = PrunePlan(stages=[Stage(layer=0, keep=0.5)], scorer=scorer, protect=protect)
    fast = torch.compile(block, backend="tokprune", options={"plan": plan, "target": "eager"})
    got = fast(x, None)
    kept = (got != x).any(-1)
    assert kept.sum(1).tolist() == [5, 5]
    assert bool(kept[:, 0].all())
    for row, which in enumerate(kept):
        torch.testing.assert_close(got[row, which], block(x[row : row + 1, which], None)[0])


def _writing(method: str, into: str, given: str) -> torch.fx.GraphModule:
    """``into.method(given)`` as Dynamo has it, of tensors with the axes of keys."""
    graph = torch.fx.Graph()

    def noted(node: torch.fx.Node, length: int) -> torch.fx.Node:
        node.meta["example_value"] = torch.empty(2, 3, length, 8)
        return node

    keys = noted(graph.placeholder("keys"), 9)
    nodes = {
        "computed": keys,
        "cache": noted(graph.call_function(torch.zeros, ((2, 3, 5, 8),)), 5),
        "part": noted(graph.call_function(operator.getitem, (keys, (..., slice(-5, None), slice(None)))), 5),
    }
    places = (2, graph.placeholder("places")) if method == "index_copy_" else ()
    graph.call_method(method, (nodes[into], *places, nodes[given]))
    return torch.fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("method", "into", "given", "is_static"),
    [
        ("index_copy_", "cache", "computed", True),
        ("copy_", "cache", "part", True),  # the end of a prompt that is longer than the window
        ("copy_", "cache", "computed", False),  # the state of a recurrence
        ("copy_", "part", "computed", False),  # keys that are put together
        ("add_", "cache", "computed", False),
    ],
)
def test_a_static_cache_is_told_by_what_is_written(method: str, into: str, given: str, is_static: bool) -> None:
    said = "key-value cache of fixed size" if is_static else "a convolution"
    with pytest.raises(RefusalError, match=said), fixed_cache_blamed(_writing(method, into, given)):
        raise RefusalError("a convolution.")
