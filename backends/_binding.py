"""From a graph with lifted parameters and symbolic sizes to an exported program of tensors alone.

Dynamo's graph takes everything as a placeholder: parameters, buffers, sizes as integers, Python floats as 0-d
tensors. A runtime outside PyTorch wants constants and tensors. `Roles` tells them apart and `export` binds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from prunepass.errors import PruneError
from prunepass.graph.capture import quiet_export
from prunepass.graph.inputs import TOKENS_TO_TRACE, fake_value, is_parameter
from prunepass.graph.spelled import spelled_out

__all__ = ["Bound", "Layout", "Roles", "export", "open_downwards", "open_inputs", "stand_in"]

#: smallest stand-in size for an open dimension
_SMALLEST = 7


@dataclass(frozen=True)
class Roles:
    """What each placeholder is to a runtime of tensors. All fields hold positions among the placeholders; those that
    nothing reads are left out.

    Attributes:
        tensors: passed at every call.
        constants: parameters and buffers, bound into the program.
        sizes: integers that can be read off a tensor: position -> (position of the tensor, dimension).
        scalars: other numbers; they become part of the program, which is therefore made once for each value.
    """

    tensors: tuple[int, ...]
    constants: tuple[int, ...]
    sizes: Mapping[int, tuple[int, int]]
    scalars: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """Positions whose values are looked at, rather than those of a tensor that tells them."""
        return (*self.tensors, *self.constants, *self.scalars)

    @classmethod
    def of(cls, graph: Graph, example_inputs: Sequence[Any]) -> Roles:
        """Read from the graph's placeholders and the values they were traced with; unused inputs get no role."""
        placeholders = graph.find_nodes(op="placeholder")
        tensors, constants, integers, scalars = [], [], [], []
        for i, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
            if not node.users:
                continue
            if not isinstance(example, Tensor):
                integers.append(i)
            elif is_parameter(node) or isinstance(example, nn.Parameter):
                constants.append(i)
            elif _is_number(node):
                scalars.append(i)
            else:
                tensors.append(i)
        where = _sizes_of(placeholders, tensors)
        sizes = {i: where[e] for i in integers if (e := _expression(fake_value(placeholders[i]))) in where}
        scalars += [i for i in integers if i not in sizes]
        return cls(tuple(tensors), tuple(constants), sizes, tuple(sorted(scalars)))


def _is_number(node: Node) -> bool:
    """A 0-d tensor that is only ever read as a Python number: how Dynamo passes a float with dynamic=True."""
    value = fake_value(node)
    if not isinstance(value, Tensor) or value.dim():
        return False
    return all(_is_item(user) for user in node.users)


def _is_item(node: Node) -> bool:
    return node.target in ("item", torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _sizes_of(placeholders: Sequence[Node], tensors: Sequence[int]) -> dict[Any, tuple[int, int]]:
    found: dict[Any, tuple[int, int]] = {}
    for i in tensors:
        for dim, size in enumerate(fake_value(placeholders[i]).shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (i, dim))
    return found


class Bound(nn.Module):
    """The graph as a module of its tensor inputs alone, with a flat tuple of tensors as output."""

    def __init__(self, gm: GraphModule, roles: Roles, args: Sequence[Any]) -> None:
        super().__init__()
        self.roles = roles
        self.arity = len(args)
        self.numbers = {i: _number(args[i]) for i in roles.scalars}
        self.graph_module = _with_numbers(gm, self.numbers)
        for i in roles.constants:
            self.register_buffer(f"constant_{i}", args[i].detach())
        self.layout = Layout()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on its tensor inputs, with everything else filled in."""
        args: list[Any] = [None] * self.arity
        for i, tensor in zip(self.roles.tensors, tensors, strict=True):
            args[i] = tensor
        for i in self.roles.constants:
            args[i] = getattr(self, f"constant_{i}")
        for i, (at, dim) in self.roles.sizes.items():
            args[i] = args[at].shape[dim]
        for i, number in self.numbers.items():
            args[i] = number
        leaves, spec = pytree.tree_flatten(self.graph_module(*args))
        self.layout.learn(spec, leaves)
        return tuple(_as_tensor(leaf) for leaf in leaves if isinstance(leaf, _TRAVELS))


#: outputs that the runtime computes; a size is no tensor, so it travels as one
_TRAVELS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class Layout:
    """How the graph's own output is made of the flat tensors; learnt while the graph is traced.

    An object of its own, since `torch.export` takes back whatever `forward` assigns to the module.
    """

    def __init__(self) -> None:
        self._spec: pytree.TreeSpec | None = None
        self._slots: list[Callable[[Iterator[Tensor]], Any]] = []

    def learn(self, spec: pytree.TreeSpec, leaves: Sequence[Any]) -> None:
        """Note the output's tree and which of its leaves travel as tensors."""
        self._spec, self._slots = spec, [_slot(leaf) for leaf in leaves]

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """The graph's own output from the flat tensors. Raises `PruneError` before `learn`."""
        if self._spec is None:
            raise PruneError("The layout of the outputs is known only after the graph was traced.")
        flat = iter(tensors)
        return pytree.tree_unflatten([slot(flat) for slot in self._slots], self._spec)


def _slot(leaf: Any) -> Callable[[Iterator[Tensor]], Any]:
    """How to get an output back from the flat tensors. Literals and None never leave Python."""
    if isinstance(leaf, Tensor):
        return next
    if isinstance(leaf, _TRAVELS):
        return lambda flat: next(flat).item()
    return lambda flat: leaf


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    dtype = {torch.SymInt: torch.int64, torch.SymFloat: torch.float32, torch.SymBool: torch.bool}[type(leaf)]
    return torch.full((), leaf, dtype=dtype)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _with_numbers(gm: GraphModule, numbers: Mapping[int, Any]) -> GraphModule:
    """A copy of the graph where ``item(placeholder)`` of a 0-d tensor is the number itself."""
    graph = Graph()
    nodes: dict[Node, Any] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    originals = gm.graph.find_nodes(op="placeholder")
    for i, number in numbers.items():
        for item in [u for u in nodes[originals[i]].users if _is_item(u)]:
            item.replace_all_uses_with(number)
            graph.erase_node(item)
    return GraphModule(gm, graph)


def export(gm: GraphModule, roles: Roles, args: Sequence[Any], *, dynamic: bool) -> tuple[Bound, ExportedProgram]:
    """The graph as an exported program whose only inputs are the tensors of ``roles``.

    Args:
        args: real values for all placeholders; parameters among them become constants, sharing their memory.
        dynamic: leave those dimensions open that are symbolic on the placeholders; else take the sizes of ``args``.

    Raises:
        PruneError: the graph writes into its inputs or buffers, or `torch.export` cannot trace it.
    """
    bound = Bound(spelled_out(gm), roles, args).eval()
    placeholders = gm.graph.find_nodes(op="placeholder")
    if dynamic:
        values, dims = open_inputs(
            gm, [fake_value(placeholders[i]) for i in roles.tensors], [args[i] for i in roles.tensors]
        )
    else:
        values, dims = [args[i].detach() for i in roles.tensors], None
    try:
        with torch.no_grad(), quiet_export():
            program = torch.export.export(bound, tuple(values), dynamic_shapes=(tuple(dims),) if dims else None)
    except Exception as e:  # torch.export raises many kinds; the cause stays attached
        raise PruneError(f"The graph could not be exported for this runtime: {type(e).__name__}: {e}") from e
    if TOKENS_TO_TRACE in gm.meta:
        open_downwards(program)
    if written := sorted({target.name for node in program.graph.nodes for target in _written(node)}):
        raise PruneError(
            f"The graph writes into {', '.join(written)} (a cache or a running statistic). Runtimes outside PyTorch "
            "would lose the write: call with use_cache=False and in eval mode, or use target='inductor'."
        )
    return bound, program


def open_downwards(program: ExportedProgram) -> None:
    """Take rows down to one token, too: a program traced where each stage keeps several takes that for a condition."""
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 1:
            program.range_constraints[symbol] = ValueRanges(1, bounds.upper)


def _written(node: Node) -> Iterator[Node]:
    """The inputs, parameters and buffers of the graph that an in-place operator changes, through views too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, Node):
            continue
        changed = value
        while (base := _base(changed)) is not None:
            changed = base
        if changed.op == "placeholder":
            yield changed


def _base(node: Node) -> Node | None:
    """The first argument, where the result is a view of it or that argument itself; else None."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or schema.returns[0].alias_info is None:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def open_inputs(
    gm: GraphModule, fakes: Sequence[Any], present: Sequence[Tensor]
) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Small stand-in tensors, and which of their dimensions are open; sizes are as large as a pruned graph asks for.

    Each symbol gets a size of its own, but for those that are one size under two names: Dynamo may call the batch of
    the tokens and the batch of the mask differently. They stand on the same axis and have the same size at ``present``.
    """
    sizes: dict[Any, int] = {}
    namesakes: dict[tuple[int, int], int] = {}
    # rows may be few: only what stands right of them can be a length
    lengths = {symbol for fake in fakes for size in fake.shape[1:] for symbol in _symbols(size)}
    enough = gm.meta.get(TOKENS_TO_TRACE, _SMALLEST)
    values, dims = [], []
    for fake, tensor in zip(fakes, present, strict=True):
        shape = []
        for axis, (size, now) in enumerate(zip(fake.shape, tensor.shape, strict=True)):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and (axis, now) in namesakes:
                sizes.setdefault(size.node.expr, namesakes[axis, now])
            shape.append(stand_in(size, sizes, enough if _symbols(size) & lengths else _SMALLEST))
            namesakes.setdefault((axis, now), shape[-1])
        values.append(torch.zeros(shape, dtype=fake.dtype))
        dims.append({d: Dim.AUTO for d, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)})
    return values, dims


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def stand_in(size: Any, sizes: dict[Any, int], at_least: int = _SMALLEST) -> int:
    """A number to trace a symbolic size with: ``sizes`` says which one its symbols have, and learns new ones.

    Sizes are distinct primes, so that no two are taken for the same one or for a multiple of another.

    Args:
        at_least: as far as the symbol's range allows.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression, ranges = size.node.expr, size.node.shape_env.var_to_range
    for symbol in expression.free_symbols:
        if symbol not in sizes:
            low, high = ranges[symbol].lower, ranges[symbol].upper
            sizes[symbol] = _prime(max(at_least, _SMALLEST), low, high, set(sizes.values())) or max(2, int(low))
    return int(expression.subs(sizes))


def _prime(start: int, low: Any, high: Any, taken: set[int]) -> int | None:
    """The first prime from ``start`` on within the bounds; where they end before it, from half of that on."""
    while start >= 2:
        for number in range(start, 2 * start + 100):
            if number > high:
                break
            if low <= number and number not in taken and all(number % d for d in range(2, isqrt(number) + 1)):
                return number
        start //= 2
    return None
