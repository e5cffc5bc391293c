"""Fake tensors for the nodes that passes added or changed."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, map_arg
from torch.fx.experimental.symbolic_shapes import DimDynamic

from prunepass.graph.inputs import fake_value
from prunepass.graph.sizes import Axis, AxisKind, concrete, quiet_fakes
from prunepass.graph.trace import Layout
from prunepass.passes.contract import Fault
from prunepass.passes.state import Rewrite

__all__ = ["metadata_faults", "refresh"]

_widths = itertools.count()


def refresh(rewrite: Rewrite) -> None:
    """Write ``meta["val"]`` of all added and changed nodes, in the graph's own fake mode.

    Where lengths are integers the nodes are simply evaluated. Where they are symbols that would take sympy seconds, so
    sizes are filled into what is known already: an inserted node's layout from its trace, a model's node from its axes.
    """
    values = [fake_value(n) for n in rewrite.graph.find_nodes(op="placeholder")]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or FakeTensorMode()
    guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with guards, torch.no_grad():
        _Writer(rewrite, mode).run()
    for node in rewrite.graph.nodes:
        node.meta.pop("layout", None)


def metadata_faults(state: Rewrite) -> Iterator[Fault]:
    """Nodes whose fake tensor is not what their operator gives for the fake tensors that they read, at the sizes of the
    traced call."""
    probe = copy.copy(state.sizes.first)
    probe.values = {}
    widths = {site.width for site in state.sites}
    with quiet_fakes():
        for node in state.graph.nodes:
            noted = _without_data(fake_value(node))
            if node.op == "get_attr" and noted is None:
                noted = probe.step(node)
            probe.values[node] = noted
            if node.op != "call_function" or fake_value(node) is None or node is state.inputs.source:
                continue  # a probe puts the tokens that a model makes in at a length of its own
            try:
                given = probe.step(node)
            except Exception as e:  # torch raises many kinds where sizes do not fit
                yield Fault(f"It cannot run on what its arguments' metadata say ({str(e).splitlines()[0]}).", node)
                given = noted
            probe.values[node] = noted
            if node in widths and isinstance(given, int):
                given = max(2, given)  # as `_new_symbol` hints
            if given is not None and _described(given) != _described(noted):
                yield Fault(f"Its metadata say {_described(noted)}, and it gives {_described(given)}.", node)


def _without_data(value: Any) -> Any:
    """A recorded value at the sizes of the traced call."""
    if isinstance(value, torch.Tensor):
        shape, strides = ([concrete(n, {}) for n in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_without_data(v) for v in value)
    if isinstance(value, torch.SymInt):
        return concrete(value, {})
    return value.node.hint if isinstance(value, (torch.SymFloat, torch.SymBool)) else value


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return [_described(v) for v in value] if isinstance(value, (tuple, list)) else value


@dataclass
class _Writer:
    rewrite: Rewrite
    mode: FakeTensorMode
    known: dict[Node, Any] = field(default_factory=dict)
    changed: set[Node] = field(default_factory=set)

    def run(self) -> None:
        lengths = fake_value(self.rewrite.inputs.tokens).shape[:2]
        symbolic = not all(isinstance(n, int) for n in lengths)
        for node in self.rewrite.graph.nodes:
            stale = fake_value(node) is None or any(a in self.changed for a in node.all_input_nodes)
            if not stale or node.op not in ("call_function", "get_attr"):
                self.known[node] = fake_value(node)
                continue
            value = self._fill_in(node) if symbolic else None
            self.known[node] = self._evaluate(node) if value is None else value
            self.changed.add(node)
            node.meta["val"] = self.known[node]
            node.meta.pop("example_value", None)
            node.meta.pop("tensor_meta", None)

    def _fill_in(self, node: Node) -> Any:
        """The value put together from known sizes; None where only evaluating tells."""
        if any(site.width is node for site in self.rewrite.sites):
            return self._new_symbol(self._evaluate(node))
        layout: Layout | None = node.meta.get("layout")
        if layout is not None:
            shape = [self._size(reading, layout) for reading in layout.shape]
            return self._empty(shape, layout.order, layout.dtype)
        level = self.rewrite.level.get(node, 0)
        return self._at_level(node, level) if level else None

    def _at_level(self, node: Node, level: int) -> Any:
        """A node of the model below a cut: its old value with the gathered length in place of the full one."""
        old, probe = fake_value(node), self.rewrite.sizes.first.values.get(node)
        width = self.rewrite.sites[level - 1].width
        axes = self.rewrite.sizes.axes(node)
        if self.rewrite.mode != "gather":
            return old
        if width is None or axes is None or not isinstance(old, torch.Tensor) or not isinstance(probe, torch.Tensor):
            return None
        shape = [self._axis(axis, size, self.known[width]) for axis, size in zip(axes, old.shape, strict=True)]
        if any(size is None for size in shape):
            return None
        strides = probe.stride()
        order = sorted(range(probe.dim()), key=lambda i: -strides[i])
        return self._empty(shape, order, old.dtype)

    def _axis(self, axis: Axis, size: Any, width: Any) -> Any:
        if axis.kind is AxisKind.SEQ:
            return width * axis.factor if axis.factor != 1 else width
        if axis.kind is AxisKind.TOKENS:
            return fake_value(self.rewrite.inputs.tokens).shape[0] * width * axis.factor
        return size if axis.kind is not AxisKind.DERIVED else None

    def _size(self, reading: Any, layout: Layout) -> Any:
        constant, factors, terms = reading
        if not factors and not terms:
            return constant
        total = constant
        for name in terms:
            total = total + self._open(name, layout)
        for name in factors:
            total = total * self._open(name, layout)
        return total

    def _open(self, name: str, layout: Layout) -> Any:
        node, axis = layout.sizes[name]
        value = self.known[node]
        return value if axis is None else value.shape[axis]

    def _empty(self, shape: Sequence[Any], order: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty_permuted(tuple(shape), tuple(order), dtype=dtype, device=self.rewrite.device)

    def _new_symbol(self, value: Any) -> Any:
        """A symbol of its own for a width: sympy would reason about the floor in ``(7 * s0 + 9) // 10`` at each use."""
        if not isinstance(value, torch.SymInt) or self.mode.shape_env is None:
            return value
        if value.node.hint is None:  # a level of the call says it, and nobody knows it before
            return value
        # with a hint of one it would be taken for a constant
        hint, source = max(2, int(value.node.hint)), ConstantSource(f"prunepass_width_{next(_widths)}")
        symbol = self.mode.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        return self.mode.shape_env.create_symintnode(symbol, hint=hint, source=source)

    def _evaluate(self, node: Node) -> Any:
        if node.op == "get_attr":
            value: Any = self.rewrite.gm
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
        assert callable(node.target)
        args, kwargs = map_arg(node.args, self.known.__getitem__), map_arg(node.kwargs, self.known.__getitem__)
        with self.mode:
            return node.target(*args, **kwargs)
