"""In-place operators and assignments to slices, written as what they compute."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import fake_value
from prunepass.graph.ops import is_mutable

__all__ = ["make_functional"]

aten = torch.ops.aten
_TO_THE_END = 2**62

#: views that show all elements of their first argument in the same places
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
#: copies or views, by the layout or the dtype of what they get: which one, the graph does not say
_EITHER = {
    aten.reshape.default,
    aten.reshape_as.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
#: of these, what gives its first argument itself where dtype and device are the same and no copy is asked for
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}


def make_functional(gm: GraphModule) -> int:
    """``x.add_(y)`` -> ``x2 = x + y``, and ``x[:, 0].add_(y)`` -> ``x2 = select_scatter(x, x[:, 0] + y, 1, 0)``.

    Later uses of x read x2, and later uses of its views read the same views of x2. Only where x was made by an operator
    in this graph, and all that shows the change is known. What stays in place is left to whoever reads the graph
    (`passes.place` refuses it below a cut).

    Returns:
        The number of operators replaced.
    """
    count = sum(_replaced(gm, node) for node in list(gm.graph.nodes))
    if count:
        gm.recompile()
    return count


def _replaced(gm: GraphModule, node: Node) -> bool:
    changed = node.args[0] if node.args else None
    functional = _functional_form(node)
    if functional is None or not isinstance(changed, Node):
        return False
    chain = _chain(changed)
    if chain is None:
        return False
    base, views = chain
    shown = _shown(base)
    late = [v for v in shown if v is not base and v < node and any(node < u for u in v.users)]
    if any(_is_either(step) for view in late for step in _trail(view, base)):
        return False
    graph = gm.graph
    with graph.inserting_before(node):
        value = functional(node)
        after = {changed: value, base: value}
        for view in reversed(views):  # the innermost first
            parent = view.args[0]
            assert isinstance(parent, Node)
            value = _written_back(view, parent, value)
            after[parent] = value
        _show(late, base, after, graph)
    for old, new in after.items():
        for user in list(old.users):
            if node < user:
                user.replace_input_with(old, new)
    node.replace_all_uses_with(after[changed])
    graph.erase_node(node)
    return True


def _show(late: list[Node], base: Node, after: dict[Node, Node], graph: torch.fx.Graph) -> None:
    """The views that are used again, of the changed value."""
    for view in late:
        if view in after:
            continue
        for step in reversed(_trail(view, base)):
            if step not in after:
                after[step] = graph.node_copy(step, lambda a: after.get(a, a))


def _trail(view: Node, base: Node) -> list[Node]:
    """The views from ``view`` up to its base, which is left out."""
    trail, at = [], view
    while at is not base:
        trail.append(at)
        parent = at.args[0]
        assert isinstance(parent, Node)
        at = parent
    return trail


def _functional_form(node: Node) -> Callable[[Node], Node] | None:
    """How to insert what an in-place operator computes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_mutable(node):
        return None
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    functional = getattr(packet, target._overloadname, None) if packet is not None else None
    if functional is None:
        return None

    def insert(node: Node) -> Node:
        made = node.graph.call_function(functional, node.args, node.kwargs)
        made.meta = dict(node.meta)
        return made

    return _copied if target is aten.copy_.default else insert


def _copied(node: Node) -> Node:
    """``view.copy_(source)``: the source in the view's shape and dtype."""
    view, source = node.args[:2]
    assert isinstance(view, Node)
    assert isinstance(source, Node)
    to, given = fake_value(view), fake_value(source)
    if to.dtype != given.dtype:
        source = _like(node.graph.call_function(aten.to.dtype, (source, to.dtype)), node)
    return _like(node.graph.call_function(aten.expand_as.default, (source, view)), node)


def _like(made: Node, node: Node) -> Node:
    made.meta = dict(node.meta)
    return made


def _chain(changed: Node) -> tuple[Node, list[Node]] | None:
    """The value that owns the storage, and the views that lead from it to ``changed``; None where that is not sure."""
    views: list[Node] = []
    node = changed
    while _is_view(node) or _is_either(node):
        parent = node.args[0] if node.args else None
        if not isinstance(parent, Node) or not _can_write_back(node):
            return None
        views.insert(0, node)
        node = parent
    return (node, views) if node.op == "call_function" and isinstance(fake_value(node), torch.Tensor) else None


def _shown(base: Node) -> list[Node]:
    """``base`` and all that may show its elements, in the graph's order."""
    seen, todo = {base}, [base]
    while todo:
        node = todo.pop()
        for user in node.users:
            shows = _is_either(user) and user.args[0] is node
            if user not in seen and (shows or _is_view_of(user, node)):
                seen.add(user)
                todo.append(user)
    return sorted(seen)


def _is_either(node: Node) -> bool:
    """Whether a node may be a copy or a view. A cast to another dtype is a copy for sure."""
    if is_mutable(node):
        return True
    if node.op != "call_function" or node.target not in _EITHER:
        return False
    source = node.args[0]
    value, given = fake_value(node), fake_value(source) if isinstance(source, Node) else None
    known = isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor)
    if _is_same(node):
        return False
    return not known or value.dtype == given.dtype  # type: ignore[union-attr]  # known: both are tensors


def _is_same(node: Node) -> bool:
    """Whether a node gives its first argument itself, the same elements in the same places."""
    if node.target in _SAME:
        return True
    if node.target not in _CASTS or any(a is True or isinstance(a, torch.memory_format) for a in node.args):
        return False
    if node.kwargs.get("copy") or node.kwargs.get("memory_format") is not None:
        return False
    value, given = (fake_value(n) if isinstance(n, Node) else None for n in (node, node.args[0]))
    if not isinstance(value, torch.Tensor) or not isinstance(given, torch.Tensor):
        return False
    return value.dtype == given.dtype and value.device == given.device and value.layout == given.layout


def _is_view(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or target in _EITHER:
        return node.op == "call_function" and _is_same(node)
    if target is operator.getitem and _is_fresh_output(node):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(fake_value(node), torch.Tensor)
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def _is_fresh_output(node: Node) -> bool:
    """Whether ``node`` is one of several outputs that share no memory with the operator's inputs, as those of topk."""
    source: Any = node.args[0]
    if not isinstance(source, Node) or not isinstance(source.target, torch._ops.OpOverload):
        return False
    return all(r.alias_info is None for r in source.target._schema.returns)


def _is_view_of(user: Node, node: Node) -> bool:
    """Whether a view is one of ``node``, and not of another of its arguments, as ``x.expand_as(node)`` is."""
    if user.op != "call_function" or not _is_view(user):
        return False
    if user.target in _CASTS:
        return user.args[0] is node
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    given = zip(user.target._schema.arguments, user.args, strict=False)
    others = [value for argument, value in given if argument.alias_info is None]
    return node not in others or user.args.count(node) > others.count(node)


# -- writing a changed view back into what it is a view of -------------------------------------------------------------


def _can_write_back(view: Node) -> bool:
    if view.target is aten.squeeze.dim:  # it does nothing where the axis is not of size one
        shape = fake_value(view.args[0]).shape if isinstance(view.args[0], Node) else ()
        dim: Any = view.args[1]
        return bool(shape) and isinstance(shape[dim], int) and shape[dim] == 1
    return _is_same(view) or view.target in _WRITES


def _written_back(view: Node, parent: Node, value: Node) -> Node:
    if _is_same(view) or _is_whole(view):
        return value
    made = _WRITES[view.target](view, parent, value)
    made.meta = {k: v for k, v in view.meta.items() if k not in ("val", "example_value", "tensor_meta")}
    made.meta["val"] = fake_value(parent)
    return made


def _is_whole(view: Node) -> bool:
    """``x[:]``, as indexing writes it for every axis that it leaves alone."""
    if view.target is not aten.slice.Tensor:
        return False
    given: list[Any] = [*view.args[2:5]]
    defaults: list[Any] = [0, _TO_THE_END, 1]
    start, end, step = given + defaults[len(given) :]
    to_the_end = end is None or (isinstance(end, int) and end >= _TO_THE_END)
    return bool(to_the_end and step == 1 and (start is None or (isinstance(start, int) and start == 0)))


def _call(target: Any, *args: Any) -> Node:
    graph = next(a for a in args if isinstance(a, Node)).graph
    return graph.call_function(target, args)


def _permuted_back(view: Node, parent: Node, value: Node) -> Node:
    order: Any = view.args[1]
    places = [d % len(order) for d in order]
    return _call(aten.permute.default, value, [places.index(i) for i in range(len(places))])


_WRITES: dict[Any, Callable[[Node, Node, Node], Node]] = {
    aten.slice.Tensor: lambda view, parent, value: _call(aten.slice_scatter.default, parent, value, *view.args[1:]),
    aten.select.int: lambda view, parent, value: _call(aten.select_scatter.default, parent, value, *view.args[1:]),
    aten.view.default: lambda _, parent, value: _call(aten.reshape_as.default, value, parent),
    aten.transpose.int: lambda view, _, value: _call(aten.transpose.int, value, *view.args[1:]),
    aten.t.default: lambda _, __, value: _call(aten.t.default, value),
    aten.permute.default: _permuted_back,
    aten.unsqueeze.default: lambda view, _, value: _call(aten.squeeze.dim, value, view.args[1]),
    aten.squeeze.dim: lambda view, _, value: _call(aten.unsqueeze.default, value, view.args[1]),
}
