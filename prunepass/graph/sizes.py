"""The size of every value at concrete batches and lengths, and from it: which axis carries the sequence.

No table of operators is needed for this: the graph is run on meta tensors (no data, no arithmetic) at two different
batches and lengths, and each axis is named after how its size answers.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import ModelInputs, fake_value, input_name, is_symbolic
from prunepass.graph.kinds import is_assertion

__all__ = ["AXES", "Axis", "AxisKind", "Probe", "Sizes", "concrete", "input_size"]

aten = torch.ops.aten
#: what a view says of strides that it cannot keep
_STRIDES = "view size is not compatible"
#: key of a placeholder's ``meta``: which of its axes are the batch or the length, where it does not begin with both
AXES = "prunepass_axes"
_ITEM = {aten.item.default, aten._local_scalar_dense.default}
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


class AxisKind(Enum):
    """How an axis answers to the batch and the length."""

    CONST = "const"
    BATCH = "batch"
    SEQ = "sequence"
    TOKENS = "batch*sequence"
    DERIVED = "derived"


@dataclass(frozen=True)
class Axis:
    """One axis of a value: its kind, and the constant it is multiplied by (heads folded into the batch: 12)."""

    kind: AxisKind
    factor: int = 1

    @property
    def is_sequence(self) -> bool:
        """Whether it is the sequence and nothing else."""
        return self.kind is AxisKind.SEQ and self.factor == 1

    @property
    def follows_length(self) -> bool:
        """Whether its size changes with the length."""
        return self.kind in (AxisKind.SEQ, AxisKind.TOKENS, AxisKind.DERIVED)


def concrete(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size as a number, with the given values for its symbols and the tracer's hint for any other."""
    if not is_symbolic(size):
        return int(size)
    expr = size.node.expr.subs(symbols)
    return int(expr) if expr.is_number else int(size.node.hint)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep torch from logging each fake kernel that fails: for a search, a failure is an answer."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class Probe:
    """Runs a graph on meta tensors at one batch and length.

    Where the model makes a fixed number of tokens itself, what makes them runs as it was traced, and the source is put
    in at the probe's length. Where their number follows the input, that gets the size which gives this length.

    Attributes:
        values: what each node gave: a meta tensor, a number, or a tuple of them.
    """

    def __init__(self, gm: GraphModule, inputs: ModelInputs, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.values: dict[Node, Any] = {}
        self._gm = gm
        self._inputs = inputs
        self._symbols: dict[Any, int] = {}
        known = (batch, length) if inputs.made_from is None else (batch,)
        for size, n in zip(fake_value(inputs.rows).shape, known, strict=False):
            if is_symbolic(size):
                self._symbols[size.node.expr] = n
        self._raw: dict[int, int] = {}  # sizes of the traced call -> sizes at this length
        if inputs.made_from is not None and inputs.fixed_length is None:
            for symbol, traced, wanted in _raw_sizes(inputs, length):
                self._symbols[symbol] = self._raw[traced] = wanted
        self._attributes: dict[str, Any] = {}

    def run(self) -> Probe:
        """Evaluate the whole graph."""
        for node in self._gm.graph.nodes:
            self.step(node)
        return self

    def step(self, node: Node, args: Any = None, kwargs: Any = None) -> Any:
        """Evaluate one node (with other arguments, if given) and remember the result.

        A view that hangs on strides of the kernel that was traced becomes a reshape in the graph.
        """
        if node is self._inputs.source and self._inputs.fixed_length is not None:
            made = fake_value(node)
            value = self._empty((self.batch, self.length, *made.shape[2:]), made)
        else:
            value = self._evaluate(node, node.args if args is None else args, kwargs)
        self.values[node] = value
        return value

    def _evaluate(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "output":
            return None
        if node.target in _ITEM:  # a float attribute that Dynamo lifted into a 0-d tensor: its value is in the trace
            hint = fake_value(node)
            return hint if isinstance(hint, (int, float, bool)) else hint.node.hint
        args = self._arguments(args)
        kwargs = self._arguments(node.kwargs if kwargs is None else kwargs)
        if isinstance(node.target, torch._ops.OpOverload) and "device" in _argument_names(node.target):
            kwargs = {**kwargs, "device": "meta"} if "device" in kwargs or not _has_tensor(args) else kwargs
        if node.op == "call_module" or is_assertion(node):
            return None
        if not isinstance(node.target, torch._ops.OpOverload) and _misses_number(node, self.values):
            return None
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except RuntimeError as e:
            if node.target is not aten.view.default or _STRIDES not in str(e):
                raise
            node.target = aten.reshape.default  # which is a view where the strides at hand allow one
            return node.target(*args, **kwargs)

    def _arguments(self, arguments: Any) -> Any:
        """Arguments by value, with every device replaced by "meta"."""
        values = fx.map_arg(arguments, self.values.__getitem__)
        if isinstance(values, tuple):
            return tuple(torch.device("meta") if isinstance(v, torch.device) else v for v in values)
        return values

    def _placeholder(self, node: Node) -> Any:
        value = fake_value(node)
        if isinstance(value, torch.Tensor):
            shape = [concrete(d, self._symbols) for d in value.shape]
            if node in self._inputs.sequence:
                shape[:2] = self.batch, self.length
            elif self._inputs.made_from is not None:
                shape = [self._made_size(n, d, i) for i, (n, d) in enumerate(zip(shape, value.shape, strict=True))]
            elif input_name(node).startswith("decoder_") and shape:
                shape[0] = self._made_size(shape[0], value.shape[0], 0)  # as many rows as the encoder has
            for axis, kind in node.meta.get(AXES, {}).items():
                shape[axis] = self.batch if kind is AxisKind.BATCH else self.length
            return self._empty(shape, value)
        if isinstance(value, torch.SymInt):
            return concrete(value, self._symbols)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return value.node.hint
        return value

    def _made_size(self, n: int, size: Any, axis: int) -> int:
        """A size of an input: the batch, what follows the number of tokens, or as it was traced. The tracer may have
        given each input its own symbols for what was equal in its call."""
        if not is_symbolic(size):
            rows = fake_value(self._inputs.rows).shape[0]
            return self.batch if axis == 0 and not is_symbolic(rows) and size == rows and rows > 1 else n
        traced = size.node.hint
        if axis == 0 and traced == concrete(fake_value(self._inputs.rows).shape[0], {}):
            return self.batch
        return self._raw.get(traced, n)

    def _attribute(self, target: str) -> Any:
        if target not in self._attributes:
            value: Any = self._gm
            for name in target.split("."):
                value = getattr(value, name)
            if isinstance(value, torch.Tensor):
                value = self._empty(value.shape, value)
            self._attributes[target] = value
        return self._attributes[target]

    def _empty(self, shape: Any, like: torch.Tensor) -> Any:
        return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def _raw_sizes(inputs: ModelInputs, length: int) -> list[tuple[Any, int, int]]:
    """The size of an input that gives a number of tokens: its symbol, its value in the traced call, and the one wanted.
    Found by halving, as more samples never give fewer tokens."""
    made = fake_value(inputs.source).shape[1]
    rows = fake_value(inputs.rows)
    symbols = [d for d in rows.shape[1:] if is_symbolic(d) and d.node.expr in made.node.expr.free_symbols]
    if not symbols:
        return []
    size = symbols[0]
    low, high = 1, max(2, 2 * int(size.node.hint))
    while low < high:
        middle = (low + high) // 2
        if concrete(made, {size.node.expr: middle}) < length:
            low = middle + 1
        else:
            high = middle
    return [(size.node.expr, int(size.node.hint), low)]


def input_size(inputs: ModelInputs, tokens: int) -> int:
    """The length of an input that gives at least so many tokens: the same, but for tokens that the model makes."""
    if inputs.made_from is None or inputs.fixed_length is not None:
        return tokens
    return max([tokens, *(wanted for _, _, wanted in _raw_sizes(inputs, tokens))])


@cache
def _argument_names(target: torch._ops.OpOverload) -> frozenset[str]:
    return frozenset(a.name for a in target._schema.arguments)


def _misses_number(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether a number that only the inputs' values tell goes into one that is computed: it is as little known."""
    if all(values[a] is not None for a in node.all_input_nodes):
        return False
    return node.target is operator.getitem or isinstance(fake_value(node), _NUMBERS)


def _has_tensor(arguments: Any) -> bool:
    return any(isinstance(a, torch.Tensor) for a in torch.utils._pytree.tree_leaves(arguments))


def shape_of(value: Any) -> Any:
    """The sizes of a probe's value: a tuple for a tensor, the number itself, a list for several."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [shape_of(v) for v in value]
    return value


class Sizes:
    """Two probes side by side: the axes of every value, and whether a number follows the length.

    Attributes:
        whole: nodes that run at the traced length only, where the model fixes the number of its tokens: a head that
            lays them out as an image. The stream before them must be at full length.
    """

    def __init__(self, first: Probe, second: Probe, whole: Iterable[Node] = ()) -> None:
        self.first, self.second = first, second
        self.whole = frozenset(whole)
        self.one_row = first.batch == second.batch == 1
        self._axes: dict[Node, tuple[Axis, ...] | None] = {}

    def axes(self, node: Node) -> tuple[Axis, ...] | None:
        """The axes of a node's tensor; None where its value is no tensor."""
        if node not in self._axes:
            self._axes[node] = self.axes_between(self.first.values.get(node), self.second.values.get(node))
        return self._axes[node]

    def axes_between(self, a: Any, b: Any) -> tuple[Axis, ...] | None:
        """The axes of a value given as it is at both probes; None where it is no tensor."""
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return None
        return tuple(self._axis(m, n) for m, n in zip(a.shape, b.shape, strict=True))

    def number(self, node: Node) -> Axis | None:
        """How an integer node answers; None where its value is no number."""
        a, b = self.first.values.get(node), self.second.values.get(node)
        if isinstance(a, bool) or not isinstance(a, int) or not isinstance(b, int):
            return None
        return self._axis(a, b)

    def sequence_axes(self, node: Node) -> tuple[int, ...]:
        """Which axes of a node's tensor are the sequence."""
        return tuple(i for i, axis in enumerate(self.axes(node) or ()) if axis.is_sequence)

    def batch_axis(self, node: Node) -> int | None:
        """The axis that is the batch and nothing else."""
        for i, axis in enumerate(self.axes(node) or ()):
            if axis == Axis(AxisKind.BATCH):
                return i
        return None

    def follows_length(self, node: Node) -> bool:
        """Whether a node's value, or a part of it where it gives several, changes with the length."""
        return self._follows(self.first.values.get(node), self.second.values.get(node))

    def _follows(self, a: Any, b: Any) -> bool:
        if isinstance(a, (tuple, list)):
            return any(self._follows(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, int) and not isinstance(a, bool) and isinstance(b, int):
            return self._axis(a, b).follows_length
        return any(axis.follows_length for axis in self.axes_between(a, b) or ())

    def _axis(self, a: int, b: int) -> Axis:
        if a == b:
            return Axis(AxisKind.CONST)
        p, q = self.first, self.second
        units = [(AxisKind.SEQ, p.length, q.length)]
        if not self.one_row:
            units = [
                (AxisKind.TOKENS, p.batch * p.length, q.batch * q.length),
                (AxisKind.SEQ, p.length, q.length),
                (AxisKind.BATCH, p.batch, q.batch),
            ]
        for kind, m, n in units:
            if a % m == 0 and b % n == 0 and a // m == b // n:
                return Axis(kind, a // m)
        return Axis(AxisKind.DERIVED)
