"""Writing graph code as plain torch functions: a function is traced once and its nodes are put into the graph.

The trace runs on fake tensors whose open sizes are large primes, so that an integer in it tells which size it is: what
comes out reads every size from its operands and is right at any batch and length. (Tracing with symbolic shapes does
the same some thirty times slower.)
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from prunepass.errors import RefusalError

__all__ = ["Extent", "Layout", "Number", "Operand", "inline"]

Extent = str | int
#: two sets of stand-ins for the batch, the length, and the lengths before and after a stage; literals of the two traces
#: must read alike. Lengths only ever fall, as they do in a plan, so that a slice to a shorter one leaves its trace.
_STAND_INS = (
    {"B": 1009, "S": 200_003, "T": 190_027, "K": 180_001, "Q": 140_009},
    {"B": 1013, "S": 200_017, "T": 190_031, "K": 180_007, "Q": 140_053},
)
_CACHE: dict[Any, tuple[GraphModule, dict[str, int]]] = {}
_CACHE_LIMIT = 512


@dataclass(frozen=True)
class Operand:
    """A tensor handed to a traced function.

    Attributes:
        node: the value.
        shape: its axes. A number is a constant; "B", "S", ... an open size, the same for all operands that name it;
            "B*12" an open size times a constant.
        dtype: its element type.
        device: where it lives.
    """

    node: Node
    shape: tuple[Extent, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> tuple[Any, ...]:
        """What a trace depends on."""
        return self.shape, self.dtype, self.device


@dataclass(frozen=True)
class Number:
    """An integer handed to a traced function: a node that computes it, under the name of its size."""

    node: Any
    size: str

    @property
    def spec(self) -> tuple[Any, ...]:
        """What a trace depends on."""
        return (self.size,)


@dataclass(frozen=True)
class Layout:
    """What an inserted node gives, for metadata: kept in ``meta["layout"]`` until the lengths around it are known.

    Attributes:
        dtype: of the tensor.
        shape: its sizes, as readings.
        order: its axes from the outermost in memory to the innermost.
        sizes: where each open size can be read: a (tensor node, axis), or (number node, None).
    """

    dtype: torch.dtype
    shape: tuple[Reading, ...]
    order: tuple[int, ...]
    sizes: dict[str, tuple[Any, int | None]]


def inline(
    graph: Graph,
    function: Callable[..., Any],
    operands: Sequence[Operand | Number],
    *,
    meta: dict[str, Any],
    key: Any = None,
) -> Any:
    """Insert ``function(*operands)`` at the graph's insert point.

    Args:
        function: takes tensors (and integers), returns a tensor or a tuple of tensors (None is allowed in it).
        meta: put on every inserted node.
        key: tells equal functions; with one, a trace is kept for operands of equal shape.

    Returns:
        The node of the result, or a tuple of them.
    """
    full_key = (key, tuple(o.spec for o in operands))
    found = _CACHE.get(full_key) if key is not None else None
    if found is None:
        found = _trace(function, operands)
        if key is not None:
            if len(_CACHE) >= _CACHE_LIMIT:
                _CACHE.pop(next(iter(_CACHE)))
            _CACHE[full_key] = found
    traced, sizes = found
    return _Copy(graph, operands, sizes, meta).run(traced)


def _trace(function: Callable[..., Any], operands: Sequence[Operand | Number]) -> tuple[GraphModule, dict[str, int]]:
    names: list[str] = []
    for operand in operands:
        shape = operand.shape if isinstance(operand, Operand) else (operand.size,)
        names += [n for n in (str(e).partition("*")[0] for e in shape if isinstance(e, str)) if n not in names]
    (first, sizes), (second, others) = (_trace_at(function, operands, _sizes(names, i)) for i in (0, 1))
    for one, two in zip(first.graph.nodes, second.graph.nodes, strict=True):
        for a, b in zip(_integers(one), _integers(two), strict=True):
            # equal in both traces: a constant, which must not look like a size by chance
            if a == b and _read(a, sizes)[1:] == ((), ()):
                continue
            if a == b or _read(a, sizes) != _read(b, others):
                raise RefusalError(
                    f"a scorer computes a size from the length in a way that cannot be followed ({one.target}).",
                    hint="Use sizes as they are, or times a constant; compute other numbers with tensors.",
                )
    return first, sizes


def _sizes(names: Sequence[str], which: int) -> dict[str, int]:
    """Stand-ins for open sizes. "K1", "K2", ... (the lengths after each stage) fall from one to the next."""
    out = {}
    for name in names:
        stage = name[1:] if name[0] == "K" and name[1:].isdigit() else None
        below = None if stage is None else 170_000 - 1000 * int(stage) - 100 * which
        out[name] = _STAND_INS[which][name] if below is None else _prime_below(below)
    return out


def _prime_below(n: int) -> int:
    return next(m for m in range(n, 1, -1) if all(m % d for d in range(2, int(m**0.5) + 1)))


def _trace_at(
    function: Callable[..., Any], operands: Sequence[Operand | Number], sizes: dict[str, int]
) -> tuple[GraphModule, dict[str, int]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        tensors = [
            torch.empty([_size(e, sizes) for e in o.shape], dtype=o.dtype, device=o.device)
            for o in operands
            if isinstance(o, Operand)
        ]

    def call(*values: torch.Tensor) -> Any:
        left = iter(values)
        return function(*(next(left) if isinstance(o, Operand) else sizes[o.size] for o in operands))

    with mode:
        return make_fx(call, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*tensors), sizes


def _size(extent: Extent, sizes: dict[str, int]) -> int:
    if isinstance(extent, int):
        return extent
    name, _, factor = extent.partition("*")
    return sizes[name] * int(factor or 1)


Reading = tuple[int, tuple[str, ...], tuple[str, ...]]  # constant, sizes to multiply by after adding, sizes to add


def _read(value: int, sizes: dict[str, int]) -> Reading:
    """What an integer of the trace stands for: ``12 * B * K``, ``S + K + 1``, ``B * (S + K)``, or itself."""
    if value >= min(sizes.values(), default=value + 1):
        for count in (1, 2):
            for names in itertools.combinations_with_replacement(sizes, count):
                product = 1
                for name in names:
                    product *= sizes[name]
                if value % product == 0 and value // product < min(sizes.values()):
                    return value // product, names, ()
        if (found := _read_sum(value, sizes, 2)) is not None:
            return found
        for name, size in sizes.items():
            found = _read_sum(value // size, sizes, 0) if value % size == 0 else None
            if found is not None:
                return 0, (name,), found[2]
    return value, (), ()


def _read_sum(value: int, sizes: dict[str, int], most: int) -> Reading | None:
    """Lengths that stand one after the other, as where several states are joined, and up to ``most`` beside them."""
    ordered = tuple(sizes)
    for start, stop in itertools.combinations(range(len(ordered) + 1), 2):
        rest = value - sum(sizes[n] for n in ordered[start:stop])
        if abs(rest) <= most:
            return rest, (), ordered[start:stop]
    return None


def _integers(node: Node) -> list[int]:
    flat, _ = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    return [a for a in flat if type(a) is int and a < 2**62]


class _Copy:
    """Puts a trace into a graph, with each integer that stands for a size replaced by a node that computes it."""

    def __init__(
        self, graph: Graph, operands: Sequence[Operand | Number], sizes: dict[str, int], meta: dict[str, Any]
    ) -> None:
        self.graph, self.operands, self.sizes, self.meta = graph, operands, sizes, meta
        self.made: dict[Any, Any] = {o.size: o.node for o in operands if isinstance(o, Number)}
        self.bindings: dict[str, tuple[Any, int | None]] = {size: (node, None) for size, node in self.made.items()}
        for operand in operands:
            for axis, extent in enumerate(operand.shape if isinstance(operand, Operand) else ()):
                if isinstance(extent, str) and "*" not in extent:
                    self.bindings.setdefault(extent, (operand.node, axis))

    def run(self, traced: GraphModule) -> Any:
        tensors = [o.node for o in self.operands if isinstance(o, Operand)]
        env: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True))
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            if node.op != "call_function":
                outside = f"a traced function takes its tensors as operands, not from outside ({node.target})"
                raise AssertionError(outside)
            args, kwargs = self._argument(node.args, env), self._argument(node.kwargs, env)
            env[node] = self._call(node.target, args, kwargs)
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                env[node].meta["layout"] = self._layout(value)
        raise AssertionError("a traced graph has an output")

    def _layout(self, value: torch.Tensor) -> Layout:
        strides = value.stride()
        order = tuple(sorted(range(value.dim()), key=lambda i: -strides[i]))
        shape = tuple(_read(n, self.sizes) for n in value.shape)
        return Layout(value.dtype, shape, order, self.bindings)

    def _call(self, target: Any, args: Any, kwargs: Any = None) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self.meta)
        return node

    def _argument(self, value: Any, env: dict[Node, Any]) -> Any:
        if isinstance(value, Node):
            return env[value]
        if isinstance(value, (list, tuple)):
            return type(value)([self._argument(v, env) for v in value])
        if isinstance(value, dict):
            return {k: self._argument(v, env) for k, v in value.items()}
        return self._number(_read(value, self.sizes)) if type(value) is int else value

    def _number(self, reading: Reading) -> Any:
        constant, factors, terms = reading
        if not factors and not terms:
            return constant
        if reading not in self.made:
            if terms:
                added = [*map(self._open_size, terms), *([constant] if constant else [])]
                total = reduce(lambda a, b: self._call(operator.add, (a, b)), added)
                parts = [total, *map(self._open_size, factors)]
            else:
                parts = [*map(self._open_size, factors), *([constant] if constant != 1 else [])]
            self.made[reading] = reduce(lambda a, b: self._call(operator.mul, (a, b)), parts)
        return self.made[reading]

    def _open_size(self, name: str) -> Any:
        if name not in self.made:
            operand, axis = next(
                (o, o.shape.index(name)) for o in self.operands if isinstance(o, Operand) and name in o.shape
            )
            self.made[name] = self._call(torch.ops.aten.sym_size.int, (operand.node, axis))
        return self.made[name]
