"""Queries that see no key: attention gives zeros for them on every target, as in PyTorch, and stays one kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtimes import CONFIG
from test_parity import exported
from torch import Tensor, nn

import zoo
from prunepass import Protect, PrunePlan, Stage, prune
from prunepass.backends import get_target
from prunepass.graph.capture import capture_module

LOWEST = torch.finfo(torch.float32).min
HINTS = {"f32": 1e-5, "bf16": 0.05}


class Attentions(nn.Module):
    """All ways of hiding keys. The first query sees none, the second only the first key.

    Args:
        folded: also without an axis of heads, which PyTorch's ONNX exporter does not know.
    """

    def __init__(self, folded: bool = True) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> dict[str, Tensor]:
        def attend(mask: Tensor, *, heads: bool = True, scale: float | None = None) -> Tensor:
            qkv = (q, k, v) if heads else (q[:, 0], k[:, 0], v[:, 0])
            return F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=scale)

        added = torch.zeros_like(mask, dtype=torch.float32)
        places = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        return {
            "flags": attend(mask),
            "by keys alone": attend(mask[:, :, :1]),
            "causal and padded": attend(mask[:, :, 1:2] & (places >= 1)),
            "a window": attend(mask & (places.abs() < 2)),
            "for all rows": attend(mask[0, 0]),
            **({"without heads": attend(mask[:, 0], heads=False)} if self.folded else {}),
            "scaled": attend(mask, scale=0.1),
            "added infinity": attend(added.masked_fill(~mask, -math.inf)),
            "added lowest": attend(added.masked_fill(~mask, LOWEST)),
            "both": attend(torch.where(mask, 0.0, LOWEST) + torch.where(places > 2, -math.inf, 0.0)),
        }


def tensors(rows: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(rows, 2, n, 8, generator=made) for n in (queries, keys, keys))
    mask = torch.rand(rows, 1, queries, keys, generator=made) < 0.5
    mask[:, :, 0] = False
    mask[:, :, 1:2] = torch.arange(keys) < 1
    return q, k, v, mask


@pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_every_kind_of_mask(target: str) -> None:
    lowering: Any = get_target(target)
    module, example = Attentions(folded=target == "openvino"), tensors(2, 6, 7)
    names = list(module(*example))
    for hint, tolerance in HINTS.items() if target == "openvino" else [("", 1e-5)]:
        program = exported(module, example)
        settings = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
        make = {"make": lowering.convert} if hint else {}
        session = lowering._session(program, settings=settings, **make)
        for inputs in (tensors(2, 6, 7), tensors(1, 300, 280)):
            wanted = module(*inputs)
            for name, found in zip(names, session(inputs), strict=True):
                torch.testing.assert_close(found, wanted[name], atol=tolerance, rtol=tolerance, msg=f"{name}, {hint}")


def pruned_or_dense(name: str, keep: float | None, inputs: dict[str, Tensor]) -> Any:
    sizes = {"num_hidden_layers" if name not in ("gpt2",) else "n_layer": 2}
    model = zoo.tiny(name, dtype=torch.float32, **sizes)
    if keep is None:
        return capture_module(model, inputs).exported
    return prune(model, PrunePlan([Stage(1, keep)], "norm", Protect(last=1)), inputs).exported


@pytest.mark.parametrize("keep", [None, 0.5], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    "name",
    ["llama", "modernbert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "gpt2", "gpt_neox", "phi"))],
)
def test_rows_with_much_padding_are_right(name: str, keep: float | None) -> None:
    """On the left of decoders; in ModernBERT, whose window is 3 tokens to either side, on the right."""
    inputs = zoo.batch([19, 5], side="right" if name == "modernbert" else "left")
    program = pruned_or_dense(name, keep, inputs)
    with torch.no_grad():
        wanted = program.module()(**inputs)[0]
    openvino: Any = get_target("openvino")
    session = openvino._session(program, make=openvino.convert, settings=CONFIG["openvino"])
    found = session(list(inputs.values()))[0]
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_row_padded_by_more_than_modernberts_own_window() -> None:
    """64 tokens to either side, 250 tokens beside 100, a stage before the second of its layers that see all tokens."""
    sizes = {"num_hidden_layers": 6, "local_attention": 128, "max_position_embeddings": 512}
    model = zoo.tiny("modernbert", dtype=torch.float32, **sizes)
    inputs = zoo.batch([250, 100])
    program = prune(model, PrunePlan([Stage(3, 0.5)], "norm"), inputs).exported
    with torch.no_grad():
        wanted = program.module()(**inputs)[0]
        alone = program.module()(**{name: value[1:, :100] for name, value in inputs.items()})[0]
    openvino: Any = get_target("openvino")
    session = openvino._session(program, make=openvino.convert, settings=CONFIG["openvino"])
    found = session(list(inputs.values()))[0]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:, :100], alone, atol=2e-4, rtol=1e-4)


def test_the_selection_is_part_of_the_attention_kernel() -> None:
    """So a masked attention costs no further pass over its values."""

    class One(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * 2

    openvino: Any = get_target("openvino")
    example = tensors(2, 6, 7)
    compiled = openvino._compile(openvino.convert(exported(One(), example)), CONFIG["openvino"])
    nodes = [openvino._executed(op) for op in compiled.get_runtime_model().get_ops()]
    kernels = [of for kind, of in nodes if kind == "Subgraph" and "Softmax" in of]
    assert len(kernels) == 1
    assert "Select" in kernels[0].split("ScaledDotProductAttention")[-1]


def test_attention_gets_masks_that_are_added_and_each_is_made_once() -> None:
    class Two(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            once = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return F.scaled_dot_product_attention(once, k, v, attn_mask=mask)

    openvino: Any = get_target("openvino")
    model = openvino.convert(exported(Two(), tensors(2, 6, 7)))
    masks = [
        op.input(3).get_source_output()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "ScaledDotProductAttention"
    ]
    assert [mask.get_element_type().get_type_name() for mask in masks] == ["f32", "f32"]
    assert len({mask.get_node().get_name() for mask in masks}) == 1
