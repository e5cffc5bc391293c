"""In-place operators on fresh values, written as what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import fake_value

__all__ = ["make_functional"]


def make_functional(gm: GraphModule) -> int:
    """``x.add_(y)`` -> ``x2 = x + y``, with later uses of x reading x2.

    Only where nothing else can see the change: x was made by an operator in this graph, and no view of it is around.
    What stays in place is left to whoever reads the graph (`passes.place` refuses it below a cut).

    Returns:
        The number of operators replaced.
    """
    count = 0
    for node in list(gm.graph.nodes):
        functional = _functional_form(node)
        changed = node.args[0] if node.args else None
        if functional is None or not isinstance(changed, Node) or not _is_private(changed):
            continue
        with gm.graph.inserting_before(node):
            made = gm.graph.call_function(functional, node.args, node.kwargs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        for user in list(changed.users):
            if made < user:
                user.replace_input_with(changed, made)
        gm.graph.erase_node(node)
        count += 1
    if count:
        gm.recompile()
    return count


def _functional_form(node: Node) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_private(node: Node) -> bool:
    """Whether a value's storage belongs to it alone."""
    if node.op != "call_function" or _is_view(node) or any(_is_view_of(user, node) for user in node.users):
        return False
    value = fake_value(node)
    return isinstance(value, torch.Tensor)


def _is_view(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def _is_view_of(user: Node, node: Node) -> bool:
    """Whether a view is one of ``node``, and not of another of its arguments, as ``x.expand_as(node)`` is."""
    if not _is_view(user):
        return False
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    given = zip(user.target._schema.arguments, user.args, strict=False)
    others = [value for argument, value in given if argument.alias_info is None]
    return node not in others or user.args.count(node) > others.count(node)
