"""Mixtures of experts: the operator against plain loops, models against the hook oracle, and exported ones."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import hooks
import oracle
import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import RefusalError
from prunepass.graph.capture import capture_module
from prunepass.graph.experts import EXPERT_LINEAR
from prunepass.graph.spelled import expert_by_expert

PLAN = PrunePlan((Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3)), "norm")


def operands(
    *, each: bool, bias: bool, transposed: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, bool]:
    """Seven tokens, two of five experts each; nobody chooses the last expert."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    experts = torch.randint(0, 4, (7, 2), generator=generator)
    weight = draw(5, 3, 6) if transposed else draw(5, 6, 3)
    return draw(7, 2, 3) if each else draw(7, 3), weight, draw(5, 6) if bias else None, experts, transposed


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, transposed: bool) -> Tensor:
    rows = []
    for t in range(len(experts)):
        for j, e in enumerate(experts[t].tolist()):
            row = (x[t] if x.dim() == 2 else x[t, j]) @ (weight[e] if transposed else weight[e].T)
            rows.append(row if bias is None else row + bias[e])
    return torch.stack(rows).unflatten(0, experts.shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_the_product_is_that_of_plain_loops(each: bool, bias: bool, transposed: bool) -> None:
    given = operands(each=each, bias=bias, transposed=transposed)
    expected = by_hand(*given)
    for product in (EXPERT_LINEAR, expert_by_expert):
        assert (product(*given) - expected).abs().max() < 1e-14
    on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in given]
    assert EXPERT_LINEAR(*on_meta).shape == expected.shape


def test_the_products_gradients() -> None:
    x, weight, bias, experts, transposed = operands(each=True, bias=True, transposed=False)
    free = [value.requires_grad_() for value in (x, weight, bias) if value is not None]
    assert torch.autograd.gradcheck(lambda x, w, b: EXPERT_LINEAR(x, w, b, experts, transposed), free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rounds_as_plain_loops_do(dtype: torch.dtype) -> None:
    x, weight, _, experts, _ = operands(each=False, bias=False, transposed=False)
    wide = (x.repeat(1, 8).to(dtype), weight.repeat(1, 4, 8).to(dtype), None, experts, False)
    exact_inputs: list[Any] = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in wide]
    exact = by_hand(*exact_inputs)
    found = EXPERT_LINEAR(*wide)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@cache
def model(name: str) -> Any:
    return zoo.tiny(name, "causal")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_pruned_experts_agree_with_hooks(name: str, implementation: str) -> None:
    """In each of transformers' own forms; row by row, padded on either side."""
    changed = zoo.tiny(name, "causal")
    changed.set_experts_implementation(implementation)
    with oracle.float64_softmax():
        pruned = prunepass.prune(changed, PLAN, harness.example(("input_ids", "attention_mask", "position_ids")))
        for side in ("right", "left"):
            x = zoo.with_positions(zoo.batch([13, 9, 4], seed=1, side=side))
            live = x["attention_mask"].bool()
            expected = hooks.run_hooked(model(name), hooks.layers_of(model(name), zoo.LAYERS), PLAN, x).output
            found = harness.run(pruned, x)
            assert harness.difference(found, expected, live) < 1e-10
            assert harness.difference(found, harness.run(model(name), x), live) > 1e-3
            row = {k: v[1:2][:, live[1]] for k, v in x.items()}
            assert (harness.run(pruned, row).logits - found.logits[1:2][:, live[1]]).abs().max() < 1e-10
    assert changed.config._experts_implementation == implementation


def test_the_graph_holds_two_products_a_layer() -> None:
    graph = capture_module(model("mixtral"), harness.example()).graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=EXPERT_LINEAR)) == 2 * zoo.LAYERS


def test_programs_exported_without_us_are_left_alone() -> None:
    from prunepass.graph import experts

    experts.install(lambda: True)
    small = zoo.tiny("mixtral", num_hidden_layers=1, dtype=torch.float32)
    small.set_experts_implementation("grouped_mm")
    program = torch.export.export(small, (), harness.example(), strict=False)
    assert not [n for n in program.graph.nodes if "prunepass" in str(n.target)]


class Look:
    """A target, and the function of a backend: counts the products of experts in what it is given."""

    def __init__(self) -> None:
        self.products = 0

    def lower(self, graph_module: Any, example_inputs: Any, *, config: Any = None) -> Any:
        self.products += len(graph_module.graph.find_nodes(op="call_function", target=EXPERT_LINEAR))
        return graph_module.forward


@pytest.mark.parametrize("ours", [True, False])
def test_models_compiled_with_another_backend_are_left_alone(ours: bool) -> None:
    small = zoo.tiny("mixtral", "causal", num_hidden_layers=2, dtype=torch.float32)
    look = Look()
    plan = PrunePlan((Stage(1, 0.5),), "norm")
    mine: Any = {"backend": "tokprune", "options": {"plan": plan, "target": look}}
    torch.compile(zoo.tiny("mixtral", "causal"), **mine)  # installs our form, which the other is not to meet
    compiled = torch.compile(small, **(mine if ours else {"backend": look.lower}))
    with torch.no_grad():
        compiled(**zoo.batch([13, 9], seed=1), use_cache=False)
    assert look.products == (4 if ours else 0)


def test_a_form_that_the_user_set_stays_set() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as TABLE

    from prunepass.graph.experts import traced_as_units

    def own(*args: Any) -> Any:
        raise AssertionError

    before = TABLE["grouped_mm"]
    TABLE["grouped_mm"] = own
    try:
        with traced_as_units():
            assert TABLE["grouped_mm"] is not own
        assert TABLE["grouped_mm"] is own
    finally:
        del TABLE["grouped_mm"]
    assert TABLE["grouped_mm"] is before


_ALONE = """
import sys, torch
module = torch.export.load(sys.argv[1] + "/model.pt2").module()
given = torch.load(sys.argv[1] + "/given.pt")
assert "prunepass" not in sys.modules
assert torch.allclose(module(**given["inputs"])["logits"], given["logits"], atol=1e-5)
"""


@pytest.mark.parametrize("to", ["pt2", "onnx", "openvino"])
def test_exported_experts_run_without_us(to: str, tmp_path: Path) -> None:
    from export.test_export import load

    small = zoo.tiny("mixtral", "causal", num_hidden_layers=2, dtype=torch.float32)
    plan = PrunePlan((Stage(1, 0.5),), "norm", Protect(first=1, last=1))
    prunepass.export(small, plan, tmp_path / "out", to=to, stateful=False)
    x = {**zoo.batch([13, 9], seed=1)}
    expected = harness.run(prunepass.prune(small, plan, x), x).logits
    found = load(tmp_path / "out")(x)["logits"]
    live = x["attention_mask"].bool()
    assert (found - expected)[live].abs().max() < 1e-4
    if to == "pt2":
        torch.save({"inputs": x, "logits": found}, tmp_path / "out" / "given.pt")
        subprocess.run([sys.executable, "-c", _ALONE, str(tmp_path / "out")], check=True)


def test_a_choice_that_is_not_the_tokens_own_is_refused() -> None:
    """Each token's expert read from the token before it."""

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = zoo.tiny("bert")
            self.weight = torch.nn.Parameter(torch.randn(4, zoo.HIDDEN, zoo.HIDDEN, dtype=torch.float64))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.base(input_ids, attention_mask)[0]
            table = torch.zeros(self.weight.shape[0], input_ids.shape[1], input_ids.shape[1], dtype=h.dtype)
            rows = EXPERT_LINEAR(h.mT.flatten(0, 1), table, None, torch.zeros(h.shape[0] * h.shape[2], 1).long(), False)
            mixed = rows.reshape(h.shape[0], h.shape[2], -1).mT
            return torch.nn.functional.scaled_dot_product_attention(mixed, mixed, mixed)

    with pytest.raises(RefusalError, match="mixes the sequence"):
        prunepass.prune(Shifted(), PrunePlan((Stage(1, 0.5),), "norm"), harness.example())
