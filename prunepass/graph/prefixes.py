"""Class and register tokens that a layer takes off its row and puts back: rotary positions for the patches alone.

``cat([x[:p], f(x[p:])])`` -> ``where(place < p, x, f(x))``, along the tokens, where f works token by token: the tables
that f reads are padded at the front. Exact, and no value has fewer tokens any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import ModelInputs, fake_value, hint
from prunepass.graph.ops import is_pointwise

__all__ = ["whole_rows"]

aten = torch.ops.aten
_SPLITS = {aten.split_with_sizes.default, aten.split.sizes}
_ALONG_OTHERS = {aten.slice.Tensor: 1, aten.cat.default: 1}


def whole_rows(gm: GraphModule, inputs: ModelInputs) -> int:
    """Rewrite an ATen graph whose model makes a fixed number of tokens, in place. Returns how many places changed."""
    length = inputs.fixed_length
    if length is None:
        return 0
    changed = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.cat.default)):
        if node not in inputs.front and _axis_of(node, node.args[1] if len(node.args) > 1 else 0, length) is not None:
            changed += _rewrite(node, inputs, length)
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return changed


def _axis_of(node: Node, dim: Any, length: int) -> int | None:
    """An axis counted from the end, negative, if it is as long as there are tokens."""
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or not isinstance(dim, int):
        return None
    axis = dim % value.dim() - value.dim()
    return axis if hint(value.shape[axis]) == length else None


def _rewrite(joined: Node, inputs: ModelInputs, length: int) -> bool:
    parts: Any = joined.args[0]
    axis = _axis_of(joined, joined.args[1] if len(joined.args) > 1 else 0, length)
    if len(parts) != 2 or axis is None or parts[0].target is not operator.getitem or parts[0].args[1] != 0:
        return False
    split: Any = parts[0].args[0]
    if split.target not in _SPLITS or len(split.args[1]) != 2:
        return False
    x, (prefix, rest) = split.args[0], split.args[1]
    if _axis_of(x, split.args[2] if len(split.args) > 2 else 0, length) != axis or not isinstance(prefix, int):
        return False
    patches = next((u for u in split.users if u.target is operator.getitem and u.args[1] == 1), None)
    steps = None if patches is None else _steps(parts[1], patches, inputs, axis, rest)
    if patches is None or steps is None:
        return False
    with joined.graph.inserting_before(joined):
        put = _Put(joined)
        made: dict[Node, Node] = {patches: x}
        for step in steps:
            for side in step.all_input_nodes:
                if side not in made:
                    made[side] = put.padded(side, axis, prefix, rest)
            assert callable(step.target)
            made[step] = put.call(step.target, torch.fx.map_arg(step.args, made.__getitem__), dict(step.kwargs))
        places = put.call(aten.arange.default, (length,), {"device": fake_value(x).device})
        is_prefix = put.call(aten.lt.Scalar, (places, prefix))
        for _ in range(-axis - 1):
            is_prefix = put.call(aten.unsqueeze.default, (is_prefix, -1))
        result = put.call(aten.where.self, (is_prefix, x, made[parts[1]]))
    joined.replace_all_uses_with(result)
    return True


def _steps(last: Node, first: Node, inputs: ModelInputs, axis: int, rest: int) -> list[Node] | None:
    """The nodes from ``first`` to ``last``, in order; None where one of them is not known to work token by token."""
    content, todo = {first}, [last]
    above = {last}
    while todo:
        for a in todo.pop().all_input_nodes:
            if a not in above and a not in inputs.front and a is not first:
                above.add(a)
                todo.append(a)
    steps = [n for n in sorted(above) if n is not first]
    for step in steps:
        value = fake_value(step)
        if not isinstance(value, torch.Tensor) or -axis > value.dim() or hint(value.shape[axis]) != rest:
            return None
        if not any(a in content for a in step.all_input_nodes):
            return None
        content.add(step)
        if is_pointwise(step):
            continue
        at = next((place for target, place in _ALONG_OTHERS.items() if step.target is target), None)
        dim: Any = 0 if at is None or len(step.args) <= at else step.args[at]
        if at is None or dim % value.dim() - value.dim() == axis:
            return None
    return steps


class _Put:
    """Puts nodes in front of one, with fake tensors."""

    def __init__(self, like: Node) -> None:
        self.like = like

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        graph = self.like.graph
        node = graph.call_function(target, args, kwargs or {})
        with fake_value(self.like).fake_mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, fake_value), **torch.fx.map_arg(kwargs or {}, fake_value))
        for name in ("nn_module_stack", "stack_trace"):
            if name in self.like.meta:
                node.meta[name] = self.like.meta[name]
        return node

    def padded(self, side: Node, axis: int, prefix: int, rest: int) -> Node:
        """A table of the patches with rows of zeros for the tokens before them; other values as they are."""
        value = fake_value(side)
        if not isinstance(value, torch.Tensor) or value.dim() < -axis or hint(value.shape[axis]) != rest:
            return side
        return self.call(aten.constant_pad_nd.default, (side, [0, 0] * (-axis - 1) + [prefix, 0]))
