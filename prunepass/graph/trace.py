"""Writing graph code as plain torch functions: a function is traced once and its nodes are put into the graph.

What is traced knows no concrete batch or length, so the same nodes are right at any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

__all__ = ["Extent", "Operand", "inline"]

Extent = str | int | tuple[str, int]

#: example sizes while tracing; any three different numbers, none of them 0 or 1
_EXAMPLE = {"B": 3, "S": 23, "T": 19, "K": 17}


@dataclass(frozen=True)
class Operand:
    """A graph value handed to a traced function.

    Attributes:
        node: the value.
        shape: its axes: "B" the batch, "S" the original length, "T" the length before a stage, "K" after it, a number, or
            a pair ("B", 12) for the batch with 12 heads folded into it.
        dtype: its element type.
        device: where it lives.
    """

    node: Node
    shape: tuple[Extent, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> tuple[Any, ...]:
        return self.shape, self.dtype, self.device


def inline(
    graph: Graph,
    function: Callable[..., Any],
    operands: Sequence[Operand],
    *,
    meta: dict[str, Any],
    cache: dict[Any, GraphModule] | None = None,
    key: Any = None,
) -> Any:
    """Insert ``function(*operands)`` at the graph's insert point.

    Args:
        function: takes tensors, returns a tensor or a tuple of tensors (None is allowed in it).
        meta: put on every inserted node.
        cache, key: reuse an earlier trace of an equal function for operands of equal shape.

    Returns:
        The node of the result, or a tuple of them.
    """
    full_key = (key, tuple(o.spec for o in operands))
    traced = cache.get(full_key) if cache is not None and key is not None else None
    if traced is None:
        traced = _trace(function, operands)
        if cache is not None and key is not None:
            cache[full_key] = traced
    placeholders = traced.graph.find_nodes(op="placeholder")
    env: dict[Node, Any] = {p: o.node for p, o in zip(placeholders, operands, strict=True)}
    return _copy(graph, traced.graph.nodes, env, meta)


def _trace(function: Callable[..., Any], operands: Sequence[Operand]) -> GraphModule:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [_example(mode, o, i) for i, o in enumerate(operands)]
    with mode:
        return make_fx(function, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


def _example(mode: FakeTensorMode, operand: Operand, index: int) -> torch.Tensor:
    size = [_example_size(d) for d in operand.shape]
    dynamic = [DimDynamic.STATIC if isinstance(d, int) else DimDynamic.DYNAMIC for d in operand.shape]
    like = torch.empty(size, dtype=operand.dtype, device="meta")
    context = StatelessSymbolicContext(dynamic_sizes=dynamic)
    fake = mode.from_tensor(like, symbolic_context=context, source=ConstantSource(f"operand{index}"))
    with mode:
        return torch.empty(fake.shape, dtype=operand.dtype, device=operand.device)


def _example_size(extent: Extent) -> int:
    if isinstance(extent, tuple):
        return _EXAMPLE[extent[0]] * extent[1]
    return extent if isinstance(extent, int) else _EXAMPLE[extent]


def _copy(graph: Graph, nodes: Iterable[Node], env: dict[Node, Any], meta: dict[str, Any]) -> Any:
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return torch.fx.map_arg(node.args[0], env.__getitem__)
        if node.op == "get_attr":
            raise AssertionError(f"a traced function must take its tensors as operands, not close over {node.target}")
        copied = graph.node_copy(node, env.__getitem__)
        copied.meta = dict(meta)
        env[node] = copied
    raise AssertionError("a traced graph has an output")
