"""What every target promises for Dynamo's graph as it is: the model's values, its dtypes, and memory of one's own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import runtimes
import torch
from runtimes import OFFLINE, SIZES, assert_same, bert, lowered, text
from torch import Tensor, nn

from prunepass.errors import OptionError, PruneError

TARGETS = ("eager", *OFFLINE, pytest.param("inductor", marks=pytest.mark.slow))


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("target", TARGETS)
def test_values_at_all_sizes(target: str, dynamic: bool | None) -> None:
    model = bert()
    fast = lowered(model, target, dynamic=dynamic)
    with torch.no_grad():
        for size in SIZES:
            assert_same(fast(**text(*size)), model(**text(*size)))


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients(target: str) -> None:
    model, twin = bert(), bert()
    lowered(model, target)(**text(2, 9)).last_hidden_state.square().mean().backward()
    twin(**text(2, 9)).last_hidden_state.square().mean().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", OFFLINE)
def test_forward_only_targets_say_so_at_backward(target: str) -> None:
    model = bert()
    output = lowered(model, target)(**text(2, 9))
    assert_same(output, model(**text(2, 9)))
    assert output.last_hidden_state.requires_grad
    with pytest.raises(PruneError, match=f"backward.*{target}.*inductor"):
        output.last_hidden_state.sum().backward()


@pytest.mark.parametrize("target", OFFLINE)
class TestOffline:
    """OpenVINO and ONNX Runtime: weights are constants there, and memory is the runtime's own."""

    def test_results_are_never_overwritten(self, target: str) -> None:
        fast = lowered(bert(), target, dynamic=True)
        with torch.no_grad():
            first = fast(**text(2, 9, seed=1)).last_hidden_state
            kept = first.clone()
            second = fast(**text(2, 9, seed=2)).last_hidden_state
        assert torch.equal(first, kept)
        assert not torch.allclose(first, second)

    def test_two_models_of_one_class_do_not_mix(self, target: str) -> None:
        models = bert(seed=1), bert(seed=2)
        fast = [lowered(m, target) for m in models]
        with torch.no_grad():
            for _ in range(2):
                for one, two in zip(fast, models, strict=True):
                    assert_same(one(**text(2, 9)), two(**text(2, 9)))

    def test_one_graph_called_with_the_weights_of_two_models(self, target: str) -> None:
        # Dynamo lifts parameters, so that layers of one class share a graph
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(self.inner(x))

        graphs: list[Any] = []

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            graphs.append(gm)
            return runtimes.backend(target)(gm, example_inputs)

        layers = [Layer() for _ in range(3)]
        fast = [torch.compile(layer, backend=backend) for layer in layers]
        x = torch.randn(2, 4)
        with torch.no_grad():
            for _ in range(2):
                for one, two in zip(fast, layers, strict=True):
                    torch.testing.assert_close(one(x), two(x), atol=1e-5, rtol=0)
        assert len(graphs) == 1

    def test_weights_changed_in_place(self, target: str) -> None:
        model = bert()
        fast = lowered(model, target)
        with torch.no_grad():
            before = fast(**text(2, 9)).last_hidden_state
            model.encoder.layer[1].output.dense.weight.mul_(1.5)
            after = fast(**text(2, 9))
            assert not torch.allclose(before, after.last_hidden_state, atol=1e-3)
            assert_same(after, model(**text(2, 9)))

    def test_weights_loaded_anew(self, target: str) -> None:
        model = bert(seed=1)
        fast = lowered(model, target)
        with torch.no_grad():
            fast(**text(2, 9))
            model.load_state_dict(bert(seed=2).state_dict(), assign=True)
            assert_same(fast(**text(2, 9)), bert(seed=2)(**text(2, 9)))

    def test_threads_share_one_compiled_model(self, target: str) -> None:
        model = bert()
        fast = lowered(model, target, dynamic=True)
        inputs = [text(2, 5 + i, seed=i) for i in range(4)]
        with torch.no_grad():
            expected = [model(**x) for x in inputs]
        wrong: list[str] = []

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(10):
                    try:
                        assert_same(fast(**inputs[i]), expected[i])
                    except Exception as e:
                        wrong.append(f"{i}: {e}")

        work(0)  # Dynamo itself compiles on one thread
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_dtypes_and_structure_of_inputs_and_outputs(self, target: str) -> None:
        def function(x: Tensor, keep: Tensor, i: Tensor, scale: float) -> dict[str, Any]:
            rows = x.shape[0]
            return {
                "chosen": torch.where(keep, x, 0.0)[i] * scale,
                "flags": keep.any(-1),
                "count": keep.sum(-1),
                "nested": ([x.mean()], None, rows + 1),
            }

        fast = torch.compile(function, backend=runtimes.backend(target), dynamic=True)
        for rows, scale in ((3, 0.5), (4, 0.25)):
            x = torch.randn(rows, 5)
            arguments = (x, x > 0, torch.tensor([2, 0]), scale)
            found, expected = fast(*arguments), function(*arguments)
            for name in ("chosen", "flags", "count"):
                assert found[name].dtype == expected[name].dtype
                torch.testing.assert_close(found[name], expected[name])
            assert found["nested"][1:] == expected["nested"][1:]
            assert found["nested"][0][0].shape == ()

    def test_inputs_of_odd_strides(self, target: str) -> None:
        fast = torch.compile(lambda x: x @ x.T, backend=runtimes.backend(target))
        x = torch.randn(6, 10)[::2, ::3]
        torch.testing.assert_close(fast(x), x @ x.T, atol=1e-5, rtol=0)

    def test_a_graph_that_writes_into_its_inputs_is_refused(self, target: str) -> None:
        def function(cache: Tensor, x: Tensor) -> Tensor:
            cache[1:].add_(x[1:])
            return x.clone().mul_(2)  # in place, but in memory of its own

        fast = torch.compile(function, backend=runtimes.backend(target))
        with pytest.raises(Exception, match="writes into") as caught:
            fast(torch.zeros(3), torch.ones(3))
        assert isinstance(caught.value.inner_exception, PruneError)

    def test_the_config_is_checked_and_left_alone(self, target: str) -> None:
        key, value, typo = {
            "openvino": ("INFERENCE_NUM_THREADS", 1, "INFERENCE_NUM_THREAD"),
            "onnxruntime": ("intra_op_num_threads", 1, "intra_op_num_thread"),
        }[target]
        gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
        with pytest.raises(OptionError, match=f"{typo}.*Did you mean '{key}'"):
            runtimes.backend(target, {typo: value})(gm, [torch.ones(1, 2)])
        with pytest.raises(OptionError, match="must be a mapping"):
            runtimes.backend(target, "fast")(gm, [torch.ones(1, 2)])  # type: ignore[arg-type]  # on purpose
        config = {key: value}
        model = bert()
        fast = torch.compile(model, backend=runtimes.backend(target, config))
        with torch.no_grad():
            assert_same(fast(**text(2, 9)), model(**text(2, 9)), within=0.2)
        assert config == {key: value}

    def test_a_value_that_cannot_be(self, target: str) -> None:
        config = {
            "openvino": {"INFERENCE_PRECISION_HINT": "f31"},
            "onnxruntime": {"intra_op_num_threads": "many"},
        }[target]
        fast = torch.compile(nn.Linear(2, 2), backend=runtimes.backend(target, config))
        with pytest.raises(Exception, match=next(iter(config))) as caught:
            fast(torch.ones(1, 2))
        assert isinstance(caught.value.inner_exception, OptionError)

    def test_inference_mode(self, target: str) -> None:
        model = bert()
        fast = lowered(model, target)
        with torch.inference_mode():
            assert_same(fast(**text(2, 9)), model(**text(2, 9)))


@pytest.mark.parametrize("target", OFFLINE)
def test_an_input_that_comes_out_as_it_is(target: str) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
            return x * window, window.to(x.device)

    x, window = torch.ones(2, 3), torch.tensor(5)
    found = lowered(Both(), target)(x, window)
    assert torch.equal(found[0], x * 5)
    assert torch.equal(found[1], window)


def test_openvino_runs_bfloat16_models() -> None:
    model = bert().to(torch.bfloat16)
    fast = lowered(model, "openvino")
    with torch.no_grad():
        found, expected = fast(**text(2, 9)), model(**text(2, 9))
    assert found.last_hidden_state.dtype == torch.bfloat16
    assert_same(found, expected, within=0.1)


@pytest.mark.parametrize(("target", "dtype"), [("openvino", torch.float64), ("onnxruntime", torch.bfloat16)])
def test_dtypes_a_runtime_cannot_honour_are_refused(target: str, dtype: torch.dtype) -> None:
    fast = lowered(nn.Linear(2, 2).to(dtype), target)
    with pytest.raises(Exception, match=r"model\.float\(\)") as caught:
        fast(torch.ones(1, 2, dtype=dtype))
    assert isinstance(caught.value.inner_exception, PruneError)


def test_inductor_knows_its_settings() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="Did you mean 'max_autotune'"):
        runtimes.backend("inductor", {"max_autotun": True})(gm, [torch.ones(1, 2)])


def test_eager_has_no_settings() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="has no settings"):
        runtimes.backend("eager", {"fast": True})(gm, [torch.ones(1, 2)])


def test_one_core_of_openvino_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that come and go may leave the stack of signal handlers where nothing is, see `core`."""
    openvino = pytest.importorskip("openvino")
    from prunepass.backends._openvino_core import core
    from prunepass.report.precision import computes_in

    made = []

    class Counted(openvino.Core):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(openvino, "Core", Counted)
    core.cache_clear()
    model = bert()
    for hint in ("f32", "bf16"):
        computes_in("openvino", model, {"INFERENCE_PRECISION_HINT": hint})
        lowered(model, "openvino")(**text(1, 5))
    assert len(made) == 1
