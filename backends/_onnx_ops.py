"""What ONNX Runtime or PyTorch's exporter to it computes otherwise than PyTorch, in other operators."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.backends._ranges import size_range
from prunepass.graph.inputs import fake_value
from prunepass.graph.masks import put
from prunepass.graph.ops import SDPA, attention_arguments

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["as_pytorch_computes"]

aten = torch.ops.aten
#: hides a key as float32's lowest number does: added to a score it leaves nothing of it
_VERY_LOW = -1e37


def as_pytorch_computes(program: ExportedProgram) -> None:
    """Rewrite the program's graph in place, which computes the same afterwards."""
    for node in list(program.graph.nodes):
        if node.target is aten.div.Tensor_mode:
            _cut_off_exactly(node)
        elif node.target is operator.floordiv:
            _round_down(node)
        elif node.target is SDPA:
            _keep_lowest(node)
    program.graph.eliminate_dead_code()


def _call(before: Node, function: Any, *args: Any, **kwargs: Any) -> Node:
    value = function(*(fake_value(a) if isinstance(a, Node) else a for a in args), **kwargs)
    made = put(before, value, function, *args)
    made.kwargs = kwargs
    return made


def _cut_off_exactly(node: Node) -> None:
    """``a / b`` of whole numbers without its fraction, which the exporter takes through float32 ->
    ``(a - fmod(a, b)) // b``."""
    args: Any = node.args
    whole = [not isinstance(a, Node) or not _is_floating(a) for a in args]
    if node.kwargs.get("rounding_mode") != "trunc" or not all(whole) or not isinstance(args[0], Node):
        return
    a, b = args
    kind = "Tensor" if isinstance(b, Node) else "Scalar"
    left = _call(node, getattr(aten.fmod, kind), a, b)
    quotient = _call(node, aten.floor_divide.default, _call(node, aten.sub.Tensor, a, left), b)
    node.replace_all_uses_with(quotient)
    node.graph.erase_node(node)


def _is_floating(node: Node) -> bool:
    value = fake_value(node)
    return not isinstance(value, Tensor) or value.is_floating_point()


def _round_down(node: Node) -> None:
    """``a // b`` of sizes, which is cut off where ``a`` is negative -> ``(a + n * b) // b - n``."""
    args: Any = node.args
    a, b = args
    low = size_range(fake_value(a))[0] if isinstance(a, Node) else 0
    if low >= 0 or not math.isfinite(low) or not isinstance(b, int):
        return
    if b < 0:
        a, b = _call(node, operator.mul, a, -1), -b
        low = min(size_range(fake_value(a))[0], 0)
    offset = math.ceil(-low / b)
    moved = _call(node, operator.floordiv, _call(node, operator.add, a, offset * b), b)
    node.replace_all_uses_with(_call(node, operator.sub, moved, offset))
    node.graph.erase_node(node)


def _keep_lowest(node: Node) -> None:
    """The lowest number in an added mask is taken for minus infinity, where rows that hold nothing else have no keys
    left; in PyTorch all keys share alike. A number a little less low does as well."""
    mask = attention_arguments(node).get("attn_mask")
    if not isinstance(mask, Node) or fake_value(mask).dtype != torch.float32:
        return
    infinite = _call(node, aten.eq.Scalar, mask, -math.inf)
    bounded = _call(node, aten.clamp.default, mask, _VERY_LOW)
    node.replace_input_with(mask, _call(node, aten.where.self, infinite, mask, bounded))
