"""Tiny float32 encoders, their texts, and the targets with the settings that make them comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from prunepass.backends import get_target

LAYERS, POSITIONS, VOCABULARY = 3, 64, 97
OFFLINE = ("openvino", "onnxruntime")
#: OpenVINO computes in bfloat16 where the CPU can, unless told otherwise
CONFIG: dict[str, dict[str, Any]] = {"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}
#: rows and tokens: the smallest, a length equal to the batch, and the longest the model takes
SIZES = ((1, 1), (3, 7), (5, 5), (2, POSITIONS))


def bert(seed: int = 0, *, num_layers: int = LAYERS, **options: Any) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        **options,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn, layer norms make all tokens alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; the first row is padded from its middle."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def backend(target: str, config: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """A torch.compile backend that lowers Dynamo's graph as it is."""

    def lower(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return get_target(target).lower(gm, example_inputs, config=CONFIG.get(target) if config is None else config)

    return lower


def lowered(module: nn.Module, target: str, **options: Any) -> Any:
    return torch.compile(module, backend=backend(target), **options)


def assert_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor], *, within: float = 1e-4) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(value.detach(), two[name].detach(), atol=within, rtol=0)


def predictor(seed: int = 0, stages: int = 1, width: int = 32, positions: bool = False) -> dict[str, Tensor]:
    """Random weights of the "mlp" scorer for the first ``stages`` stages."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc1.weight": (width, width), "fc1.bias": (width,), "fc2.weight": (1, width), "fc2.bias": (1,)}
    shapes |= {"position.weight": (width, 2)} if positions else {}
    return {
        f"stages.{i}.{name}": torch.randn(shape, generator=generator)
        for i in range(stages)
        for name, shape in shapes.items()
    }
