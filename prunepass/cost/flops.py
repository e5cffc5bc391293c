"""FLOPs of a graph at any (batch, length), from one propagation of symbolic shapes.

Running a graph on fake tensors takes about 0.1 s for a 12-layer encoder: too long for a corpus with hundreds of
lengths. So it runs once on symbolic sizes, every node's count becomes an expression in the batch b and the length s,
and those are compiled to plain Python. The propagation has to assume things about the sizes (guards), most of which
concern memory layout and leave the counts alone. So where some of them fail, the graph is run at that point and the
formulas are compared with what it gave: they are trusted, or not, wherever just the same guards fail.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import sympy  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import SymInt, Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.printers import PythonPrinter

from prunepass.cost.formulas import Size, formula_of
from prunepass.errors import CaptureError, OptionError
from prunepass.graph.inputs import TOKEN_SIZES, TOKENS_TO_TRACE, fake_value, hint, is_symbolic
from prunepass.graph.streams import find_inputs

__all__ = ["FlopCounter", "flops_of_run"]

log = logging.getLogger(__name__)


class FlopCounter:
    """Counts the FLOPs of a graph at any batch and length.

    Args:
        graph_module: ATen graph whose parameters are ``get_attr`` nodes. Its placeholders' metadata say which of their
            axes are symbolic; those become the batch (axis 0) and the length.
        batch, length: sizes at which the graph is known to run (those of the example); both only serve as hints, and
            a 1 is raised to 2, because sizes of 1 are special to symbolic shapes. For the same reason a pruned graph is
            looked at no shorter than where each stage keeps two tokens. The length of a sound is that of the input,
            in samples; that of an image is the number of its tokens, and fixed.
        stream: which residual stream's tokens are meant, see `prunepass.PrunePlan`.

    Raises:
        CaptureError: the graph holds a higher-order operator whose inside cannot be counted, or does not run.
    """

    def __init__(
        self, graph_module: fx.GraphModule, *, batch: int = 2, length: int = 16, stream: str | None = None
    ) -> None:
        self.graph_module = graph_module
        self._tokens: tuple[Size, Size] = _token_sizes(graph_module, stream)
        if not is_symbolic(self._tokens[1]):
            length = int(self._tokens[1])
        self._inputs = _describe_inputs(graph_module, self._tokens)
        self._hint = (max(2, batch), max(2, length, self._tokens_to_trace()))
        self._counts: dict[tuple[int, int], Counts] = {}
        self._trusted: dict[tuple[bool, ...], bool] = {}

    def total(self, batch: int, length: int) -> int:
        """FLOPs of one run on inputs of shape ``[batch, length]``."""
        return sum(self.per_node(batch, length).values())

    def per_node(self, batch: int, length: int) -> dict[str, int]:
        """FLOPs by node name; nodes that are no contraction are left out."""
        return self._at(batch, length).flops

    def moved(self, batch: int, length: int) -> int:
        """Elements written by the nodes that pruning inserted (sorts, gathers, masks): their work has no FLOPs."""
        return self._at(batch, length).moved

    @property
    def max_length(self) -> int | None:
        """Greatest length the graph itself allows (its position table, say); None where it sets no bound."""
        return self._formulas.max_length

    def _tokens_to_trace(self) -> int:
        """As many as the graph asks for, as far as it was traced to take them."""
        wanted, length = int(self.graph_module.meta.get(TOKENS_TO_TRACE, 2)), self._tokens[1]
        if not isinstance(length, SymInt):
            return 2
        upper = length.node.shape_env.bound_sympy(length.node.expr).upper
        return wanted if wanted <= upper else int(upper)

    @cached_property
    def _formulas(self) -> Formulas:
        return _propagate_symbols(self.graph_module, self._inputs, *self._hint)

    def _at(self, batch: int, length: int) -> Counts:
        self._check(batch, length)
        if (batch, length) not in self._counts:
            self._counts[batch, length] = self._count(batch, length)
        return self._counts[batch, length]

    def _count(self, batch: int, length: int) -> Counts:
        guards = self._formulas.guards(batch, length)
        if all(guards) or self._trusted.get(guards):
            return self._formulas.evaluate(batch, length)
        counts = _run_at(self.graph_module, self._inputs, batch, length)
        if guards not in self._trusted:
            self._trusted[guards] = counts == self._formulas.evaluate(batch, length)
            log.debug("FLOPs at batch %d, length %d: formulas hold: %s", batch, length, self._trusted[guards])
        return counts

    def _check(self, batch: int, length: int) -> None:
        if batch < 1 or length < 1:
            raise OptionError(f"Batch and length must be at least 1, not {batch} and {length}.")
        for name, size, traced in zip(("batch", "length"), (batch, length), self._tokens, strict=True):
            if not isinstance(traced, SymInt) and size != traced:
                raise OptionError(
                    f"The graph was traced for a fixed {name} of {traced}, so it has no cost at {size}. Trace it with "
                    f"a dynamic {name}."
                )
        if self.max_length is not None and length > self.max_length:
            raise OptionError(f"The model takes at most {self.max_length} tokens, not {length}.")


@dataclass(frozen=True)
class Counts:
    """FLOPs by node name, and the elements written by inserted nodes."""

    flops: dict[str, int]
    moved: int


@dataclass(frozen=True)
class Formulas:
    """Compiled expressions of (b, s): one function for the distinct values, and which node takes which of them."""

    function: Callable[[int, int], tuple[int, ...]]
    slots: dict[str, int]  # node name -> index into the function's result; the last index is the elements moved
    guards: Callable[[int, int], tuple[bool, ...]]  # what was assumed of the sizes
    max_length: int | None

    def evaluate(self, batch: int, length: int) -> Counts:
        """Operations by node name, and elements moved, at one batch and length."""
        values = self.function(batch, length)
        return Counts({name: values[slot] for name, slot in self.slots.items()}, values[-1])


# -- inputs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A placeholder: its axes as "b", "s" or a fixed size; ``dtype`` is None for an input that is a plain integer."""

    axes: tuple[str | int, ...]
    dtype: torch.dtype | None
    device: torch.device | None

    def make(self, batch: Size, length: Size) -> Any:
        """An empty tensor of that shape (or the integer itself); the sizes may be symbolic."""
        symbolic = {"b": batch, "s": length}
        sizes = [symbolic[axis] if isinstance(axis, str) else axis for axis in self.axes]
        if self.dtype is None:
            return sizes[0]
        return torch.empty(sizes, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Constant:
    """A placeholder that holds neither numbers of tokens nor sizes: ``use_cache=False``."""

    value: bool | float | str | None

    def make(self, batch: Size, length: Size) -> Any:
        """The value of the example, whatever the sizes."""
        return self.value


def _token_sizes(graph_module: fx.GraphModule, stream: str | None) -> tuple[Size, Size]:
    """The batch and the tokens of a row."""
    known = graph_module.meta.get(TOKEN_SIZES)
    if known is None:
        inputs = find_inputs(graph_module, stream)
        known = fake_value(inputs.rows).shape[0], fake_value(inputs.tokens).shape[1]
    batch, length = known
    return batch, length


def _describe_inputs(graph_module: fx.GraphModule, tokens: tuple[Size, Size]) -> tuple[Input | Constant, ...]:
    return tuple(_describe(node, tokens) for node in graph_module.graph.find_nodes(op="placeholder"))


def _describe(node: fx.Node, tokens: tuple[Size, Size]) -> Input | Constant:
    value = fake_value(node)
    if isinstance(value, Tensor):
        axes = tuple(_axis(size, axis, tokens) for axis, size in enumerate(value.shape))
        return Input(axes, value.dtype, value.device)
    if value is None or isinstance(value, (bool, float, str)):
        return Constant(value)
    if isinstance(value, (int, SymInt)):
        return Input((_axis(value, 1, tokens),), None, None)
    raise CaptureError(f"Input {node.name!r} of the graph is neither a tensor nor a size, but {type(value).__name__}.")


def _axis(size: Size, axis: int, tokens: tuple[Size, Size]) -> str | int:
    if not is_symbolic(size):
        return int(size)
    if axis and not is_symbolic(tokens[1]):
        return hint(size)  # another stream's length, beside an image's
    for name, symbol in zip("bs", tokens, strict=True):
        if isinstance(symbol, SymInt) and symbol.node.expr == size.node.expr:
            return name
    # torch.export leaves sizes apart that nothing in the model ties together; by position they are the same.
    return "b" if axis == 0 else "s"


# -- runs ----------------------------------------------------------------------------------------------------------


def flops_of_run(graph_module: fx.GraphModule, values: Sequence[Any]) -> Counts:
    """FLOPs of one run on real values, for graphs whose widths are read from them.

    Args:
        graph_module: as of `FlopCounter`.
        values: of its placeholders, in order.

    Raises:
        CaptureError: the graph holds a higher-order operator whose inside cannot be counted.
    """
    recorder = _Recorder(graph_module, None)
    with torch.no_grad():
        recorder.run(*values, enable_io_processing=False)
    return Counts(recorder.flops, recorder.moved)


class _Recorder(fx.Interpreter):
    """Runs a graph and writes down the FLOPs of each node: on fake tensors of ``mode``, or without it on real ones."""

    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode | None) -> None:
        super().__init__(graph_module)
        self.mode = mode
        self.flops: dict[str, Size] = {}
        self.moved: Size = 0
        self._current = ""

    def run_node(self, n: fx.Node) -> Any:
        self._current = n.name
        result = super().run_node(n)
        if not isinstance(result, Tensor):
            return result
        if n.op == "get_attr" and self.mode is not None:
            return self.mode.from_tensor(result, static_shapes=True)
        if n.op == "call_function" and "prunepass" in n.meta:
            self.moved = self.moved + prod(result.shape)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"The graph calls the higher-order operator {target.name()}, whose inside cannot be counted. Load the "
                'model with attn_implementation="sdpa" or "eager".'
            )
        result = super().call_function(target, args, kwargs)
        formula = formula_of(target)
        if formula is not None:
            self.flops[self._current] = formula(result, *args, **kwargs)
        return result


def _record(
    graph_module: fx.GraphModule, inputs: Sequence[Input | Constant], mode: FakeTensorMode, *sizes: Size
) -> _Recorder:
    recorder = _Recorder(graph_module, mode)
    # Some operators have their symbolic shapes only in Python (torch.export runs under this dispatcher too).
    with torch.no_grad(), mode, enable_python_dispatcher():
        recorder.run(*(i.make(*sizes) for i in inputs), enable_io_processing=False)
    return recorder


def _run_at(graph_module: fx.GraphModule, inputs: Sequence[Input | Constant], batch: int, length: int) -> Counts:
    try:
        recorder = _record(graph_module, inputs, FakeTensorMode(allow_non_fake_inputs=True), batch, length)
    except RuntimeError as e:
        raise OptionError(
            f"The model does not run on inputs of shape [{batch}, {length}]: {str(e).splitlines()[0]}"
        ) from e
    return Counts({name: int(count) for name, count in recorder.flops.items()}, int(recorder.moved))


def _propagate_symbols(
    graph_module: fx.GraphModule, inputs: Sequence[Input | Constant], batch: int, length: int
) -> Formulas:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC] * 2, constraint_sizes=[None] * 2
    )
    sizes: Sequence[Size] = mode.from_tensor(torch.empty(batch, length), symbolic_context=context).shape
    recorder = _record(graph_module, inputs, mode, *sizes)

    symbols = [size.node.expr for size in sizes]
    counts = {name: _expression(count) for name, count in recorder.flops.items()}
    distinct = list(dict.fromkeys(counts.values()))
    moved = _expression(recorder.moved)
    guards = list(dict.fromkeys(guard.expr for guard in shapes.guards))
    return Formulas(
        function=_compile(symbols, [*distinct, moved]),
        slots={name: distinct.index(count) for name, count in counts.items()},
        guards=_compile(symbols, guards),
        max_length=_upper_bound(shapes, symbols[1]),
    )


def _expression(size: Size) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _compile(symbols: Sequence[sympy.Symbol], expressions: Sequence[sympy.Basic]) -> Callable[[int, int], Any]:
    """The values of ``expressions`` as a function of the two sizes.

    The text that is compiled is sympy's print of arithmetic on shapes; nothing in it comes from outside.
    """
    body = "".join(f"({PythonPrinter().doprint(expression)}), " for expression in expressions)
    function: Callable[[int, int], Any] = eval(f"lambda {', '.join(map(str, symbols))}: ({body})", {"math": math})
    return function


def _upper_bound(shapes: ShapeEnv, symbol: sympy.Symbol) -> int | None:
    upper = shapes.var_to_range[symbol].upper
    return int(upper) if upper.is_Integer and upper < sys.maxsize // 2 else None
