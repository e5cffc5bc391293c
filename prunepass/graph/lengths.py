"""Making the length of a static graph a value again.

Dynamo first compiles a model for the lengths of its first call and bakes them in as integers: ``view(x, [8, 128,
12, 64])``. Nothing says which 128 is the length and which a width. We ask the graph: it is replayed on fake tensors at
other batches and lengths, literal by literal. Most literals have one reading that fits (a ``view`` must line up with
its input's axes, an ``expand`` with those it does not stretch); where several do, they are tried in order of likelihood
and a later operation that does not fit sends the search back to the choice that it depends on.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.inputs import ModelInputs, fake_value
from prunepass.graph.modules import module_path
from prunepass.graph.ops import int_argument, is_pointwise
from prunepass.graph.sizes import Probe, Sizes, concrete, quiet_fakes, shape_of

__all__ = ["Extent", "resolve_lengths"]

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_KEEPS_VALUES = {
    *_VIEWS,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.add.Tensor,  # transformers adds an offset, 0 without a cache
    aten.to.dtype,
    aten.to.device,
    aten.alias.default,
    aten.expand.default,
}
#: arguments that hold sizes and offsets along axes, in ATen's own names (`dim`, `normalized_shape`, ... never follow S)
_SIZE_ARGUMENTS = {
    "size",
    "shape",
    "sizes",
    "start",
    "end",
    "length",
    "index",
    "split_size",
    "split_sizes",
    "repeats",
    "pad",
}
_FACTORY_WORDS = ("arange", "zeros", "ones", "full", "empty", "eye", "rand")
_MAX_BACKTRACKS = 500


@dataclass(frozen=True)
class Extent:
    """``const + length * S + batch * B + tokens * B * S``: one reading of an integer."""

    const: int = 0
    length: int = 0
    batch: int = 0
    tokens: int = 0

    def at(self, batch: int, length: int) -> int:
        """The integer that this reading gives for a batch and a length."""
        return self.const + self.length * length + self.batch * batch + self.tokens * batch * length

    def __mul__(self, other: Extent) -> Extent | None:
        """The product, or None where it would be of a higher order than B * S."""
        if self.is_const or other.is_const:
            return other.times(self.const) if self.is_const else self.times(other.const)
        one, two = sorted((self, other), key=lambda e: e.batch)
        if one == Extent(length=one.length) and two == Extent(batch=two.batch):
            return Extent(tokens=one.length * two.batch)
        return None

    def times(self, factor: int) -> Extent:
        """The product with a constant."""
        return Extent(factor * self.const, factor * self.length, factor * self.batch, factor * self.tokens)

    @property
    def is_const(self) -> bool:
        """Whether it is the same at every batch and length."""
        return not (self.length or self.batch or self.tokens)


Reading = tuple[tuple[tuple[Any, ...], Extent], ...]  # (path into args, extent) for each literal that is not constant


@dataclass
class _Choice:
    position: int
    readings: Iterator[Reading]
    blame: set[Node] = field(default_factory=set)  # what later failures that came back here depended on


@dataclass(frozen=True)
class _Failure:
    position: int
    message: str


def resolve_lengths(gm: GraphModule, inputs: ModelInputs) -> tuple[Sizes, int]:
    """Replace literals that are lengths by nodes that compute them, in place.

    ``view(x, [8, 128, 12, 64])`` -> ``view(x, [sym_size(ids, 0), sym_size(ids, 1), 12, 64])``

    A graph whose batch and length are symbolic already is only measured.

    Returns:
        The sizes of all values, and the number of literals replaced.

    Raises:
        RefusalError: a length is baked into a place that has no consistent reading.
    """
    batch, length = fake_value(inputs.tokens).shape[:2]
    static = isinstance(batch, int) and batch > 1, isinstance(length, int)
    at_batch, at_length = concrete(batch, {}), concrete(length, {})
    error: RefusalError | None = None
    for (b1, s1), (b2, s2) in _probe_sizes(at_batch, at_length, fixed_batch=batch == 1):
        first, second = Probe(gm, inputs, b1, s1), Probe(gm, inputs, b2, s2)
        solver = _Solver(gm, Probe(gm, inputs, at_batch, at_length) if any(static) else None, first, second, static)
        try:
            with quiet_fakes():
                readings = solver.solve()
        except RefusalError as e:  # a length that the model does not take, such as one over its position table
            if error is not None and error.where == e.where and s1 < at_length:
                break
            error = error or e
            continue
        count = _materialise(gm, inputs, readings)
        for node, slices in solver.tables.items():
            count += _cut_tables(gm, inputs, node, slices)
        for node in gm.graph.nodes if count else ():
            if node not in first.values:
                first.step(node)
                second.step(node)
        return Sizes(first, second), count
    assert error is not None
    raise error


def _probe_sizes(batch: int, length: int, *, fixed_batch: bool) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (batch, length) to replay at: lengths under the traced one first, since a model takes those surely."""
    below = [n for n in range(length - 1, 4, -1) if _is_prime(n)][:2]
    pairs = [tuple(below)] if len(below) == 2 and below[-1] >= 7 else []
    pairs += [(11, 13), (5, 7), (2, 3)]
    if length > 3:
        pairs.append((length - 1, length - 2))
    batches = (1, 1) if fixed_batch else (3, 5)
    for s1, s2 in pairs:
        if fixed_batch or batches[0] * s2 != batches[1] * s1:
            yield (batches[0], s1), (batches[1], s2)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


class _Solver:
    """Depth-first replay with backtracking to the last choice that a failing node depends on."""

    def __init__(
        self, gm: GraphModule, original: Probe | None, first: Probe, second: Probe, static: tuple[bool, bool]
    ) -> None:
        # a graph whose lengths are symbolic has nothing to compare with: its first probe stands in for the original
        self.original, self.first, self.second = original or first, first, second
        self.nodes = list(gm.graph.nodes)
        self.static_batch, self.static_length = static
        self.readings: dict[Node, Reading] = {}
        self.with_literals: set[Node] = set()
        self.tables: dict[Node, dict[Node, int]] = {}  # consumer -> table made for exactly this length -> its axis
        self.from_data: set[Node] = set()  # nodes that depend on the model's inputs, not on weights alone

    def solve(self) -> dict[Node, Reading]:
        """A reading for every literal, such that the whole graph replays at both probes.

        Raises:
            RefusalError: there is none; it names the node that got furthest.
        """
        choices: list[_Choice] = []
        furthest = _Failure(-1, "")
        position = steps = 0
        while position < len(self.nodes):
            node = self.nodes[position]
            reopened = bool(choices) and choices[-1].position == position
            if reopened:
                choice = choices[-1]
            else:
                self._note(node)
                choice = _Choice(position, self._readings(node))
                if node in self.with_literals:
                    choices.append(choice)
            failure = self._try(node, choice.readings)
            if failure is None:
                position += 1
                continue
            if failure and position > furthest.position:
                furthest = _Failure(position, failure)
            steps += 1
            blame = self._ancestors(node) | choice.blame
            if choices and choices[-1] is choice:
                choices.pop()
            while choices and self.nodes[choices[-1].position] not in blame:
                choices.pop()
            if not choices or steps > _MAX_BACKTRACKS:
                raise self._refusal(furthest)
            choices[-1].blame |= blame
            position = choices[-1].position
        return {n: r for n, r in self.readings.items() if r}

    def _note(self, node: Node) -> None:
        if node in (self.original._inputs.sequence) or any(a in self.from_data for a in node.all_input_nodes):
            self.from_data.add(node)

    def _try(self, node: Node, readings: Iterator[Reading]) -> str | None:
        """Evaluate the node with the next reading that fits. None on success, else why the last one did not."""
        failure = ""
        for reading in readings:
            try:
                if node not in self.original.values:
                    self.original.step(node)
                for probe in (self.first, self.second):
                    probe.step(node, *_with_reading(node, reading, probe))
                self.tables.pop(node, None)
            except Exception as e:  # fake kernels raise whatever the operator raises
                failure = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                if not self._with_tables_cut(node):
                    continue
            if self._consistent(node):
                self.readings[node] = reading
                return None
            failure = "its size does not follow the length"
        return failure

    def _consistent(self, node: Node) -> bool:
        sizes = [shape_of(p.values[node]) for p in (self.original, self.first, self.second)]
        return _agree(*sizes) and (node.target is not aten.index.Tensor or self._index_fits(node))

    def _with_tables_cut(self, node: Node) -> bool:
        """Evaluate ``x + table`` where the table, made of weights alone, has exactly the traced length: at the longest
        length that a model takes, its ``table[:, :S]`` does nothing and leaves no trace."""
        if not self.static_length or not is_pointwise(node) or self.first.length >= self.original.length:
            return False
        axes = {}
        for a in node.all_input_nodes:
            shape = tuple(getattr(self.original.values[a], "shape", ()))
            if a not in self.from_data and self.original.length in shape:
                axes[a] = shape.index(self.original.length)
        if not axes:
            return False
        try:
            for probe in (self.first, self.second):
                kept = {a: probe.values[a] for a in axes}
                probe.values |= {a: v.narrow(axes[a], 0, probe.length) for a, v in kept.items()}
                try:
                    probe.step(node)
                finally:
                    probe.values |= kept
        except Exception:  # not the reason why the node failed
            return False
        self.tables[node] = axes
        return True

    def _index_fits(self, node: Node) -> bool:
        """Whether ``x[arange(n), ...]`` stays in x at both probes. It tells B from S, and fake kernels do not look."""
        source: Any = node.args[0]
        indices: Any = node.args[1]  # a list of nodes and None
        for axis, index in enumerate(indices):
            while isinstance(index, Node) and index.target in _KEEPS_VALUES:
                index = index.args[0]
            if not isinstance(index, Node) or index.target is not aten.arange.default:
                continue
            for probe in (self.first, self.second):
                if probe.values[index].shape[0] > probe.values[source].shape[axis]:
                    return False
        return True

    def _ancestors(self, node: Node) -> set[Node]:
        seen, todo = {node}, [node]
        while todo:
            for a in todo.pop().all_input_nodes:
                if a not in seen:
                    seen.add(a)
                    todo.append(a)
        return seen

    def _refusal(self, failure: _Failure) -> RefusalError:
        node = self.nodes[failure.position]
        return RefusalError(
            f"the graph does not replay at another length than the traced one ({node.name}: {failure.message}).",
            where=module_path(node) or node.name,
            hint="A length is baked in there, or the model cuts the sequence into pieces of a fixed size. "
            "torch.compile(..., dynamic=True) keeps lengths symbolic and may help.",
        )

    # -- readings of one node's literals, likeliest first ------------------------------------------------------

    def _readings(self, node: Node) -> Iterator[Reading]:
        literals = self._literals(node)
        if not literals:
            return iter([()])
        self.with_literals.add(node)
        if node.target in _VIEWS:
            # where the axes line up there is one reading; another might fit as well, with batch and heads swapped
            aligned = list(self._aligned_view(node, literals))
            return iter(aligned) if aligned else self._any(node, literals)
        if node.target is aten.expand.default:
            return self._expanded(node, literals)
        return self._any(node, literals)

    def _literals(self, node: Node) -> list[tuple[tuple[Any, ...], int]]:
        """Integers in size positions that could be read as a length: (path into the arguments, value)."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return []
        if not (self.static_batch or self.static_length):
            return []
        found = []
        for i, argument in enumerate(node.target._schema.arguments):
            key: Any = i if i < len(node.args) else argument.name
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if argument.name not in _SIZE_ARGUMENTS or value is None:
                continue
            for j, v in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                path = (key, j) if isinstance(value, (list, tuple)) else (key,)
                if isinstance(v, int) and not isinstance(v, bool) and len(self._extents(v)) > 1:
                    found.append((path, v))
        return found

    def _extents(self, value: int) -> list[Extent]:
        """All readings of an integer, the length first, the constant last."""
        out = []
        b, s = self.original.batch, self.original.length
        if self.static_length and value == s:
            out.append(Extent(length=1))
        if self.static_batch and value == b:
            out.append(Extent(batch=1))
        if self.static_length and abs(value) > 1:
            out += [Extent(tokens=value // (b * s))] if self.static_batch and value and value % (b * s) == 0 else []
            out += [Extent(length=value // s)] if value and value % s == 0 and value != s else []
            out += [Extent(const=value - s, length=1)] if 0 < abs(value - s) <= 2 else []
            out += [Extent(const=value - 2 * s, length=2)] if 0 < abs(value - 2 * s) <= 2 else []
        if self.static_batch and value > b and value % b == 0:
            out.append(Extent(batch=value // b))
        return [*out, Extent(const=value)]

    def _any(self, node: Node, literals: list[tuple[tuple[Any, ...], int]]) -> Iterator[Reading]:
        options = []
        for path, value in literals:
            extents = self._extents(value)
            exact = [e for e in extents if not e.is_const and e.at(1, 1) == 1 and not e.const]
            rest = [e for e in extents if e not in exact and (e.length or e.tokens)]
            const = [Extent(const=value)]
            options.append([*exact, *const, *rest] if self._likely_length(node, path) else [*const, *exact, *rest])
        for combination in itertools.product(*options):
            yield tuple((p, e) for (p, _), e in zip(literals, combination, strict=True) if not e.is_const)

    def _likely_length(self, node: Node, path: tuple[Any, ...]) -> bool:
        """Whether a literal here is rather a length than a width, before anything else is known."""
        name = node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        if any(word in name for word in _FACTORY_WORDS):
            return True
        if node.target is aten.slice.Tensor:
            # rows of a table of positions, against halves of a head: the former comes from weights alone
            source: Any = node.args[0]
            value, other = self.first.values[source], self.second.values[source]
            dim = int_argument(node, 1) % value.dim() if len(node.args) > 1 else 0
            return value.shape[dim] != other.shape[dim] or (source not in self.from_data and dim != value.dim() - 1)
        return False

    def _expanded(self, node: Node, literals: list[tuple[tuple[Any, ...], int]]) -> Iterator[Reading]:
        """Axes that the input has keep the input's size; only stretched ones are open."""
        source: Any = node.args[0]
        before = tuple(self.original.values[source].shape)
        sizes: Any = node.args[1]
        offset = len(sizes) - len(before)
        fixed: list[tuple[tuple[Any, ...], Extent]] = []
        options: list[list[tuple[tuple[Any, ...], Extent]]] = []
        for path, value in literals:
            axis = path[1] - offset
            if axis >= 0 and before[axis] == value and value != 1:
                extent = self._extent_of_axis(source, axis)
                if extent is None:
                    return
                fixed.append((path, extent))
                continue
            readings = [e for e in self._extents(value) if e.is_const or not e.const]
            if path[1] > 0:  # heads folded into the batch stand first
                readings = [e for e in readings if e.is_const or e.at(1, 1) == 1]
            # the first axis is the batch's place, the others the length's; repeated heads stand before the batch there
            order = [Extent(batch=1)] if path[1] == 0 else []
            order += [Extent(length=1), Extent(const=value)]
            readings.sort(key=lambda e: order.index(e) if e in order else len(order))
            options.append([(path, e) for e in readings])
        for combination in itertools.product(*options):
            yield tuple((p, e) for p, e in (*fixed, *combination) if not e.is_const)

    def _extent_of_axis(self, node: Node, axis: int) -> Extent | None:
        """The extent of an axis from its sizes at the original and both probes."""
        size0, size1, size2 = (p.values[node].shape[axis] for p in (self.original, self.first, self.second))
        for extent in [Extent(const=size0), *self._products(size0), *self._extents(size0)]:
            if extent.at(self.first.batch, self.first.length) == size1 and (
                extent.at(self.second.batch, self.second.length) == size2
            ):
                return extent
        return None

    def _products(self, size: int) -> Iterator[Extent]:
        """The length, the batch or both, times a constant: of axes, which may be symbolic, not of literals."""
        assert self.original is not None
        b, s = self.original.batch, self.original.length
        if size % s == 0:
            yield Extent(length=size // s)
        if size % b == 0:
            yield Extent(batch=size // b)
        if size % (b * s) == 0:
            yield Extent(tokens=size // (b * s))

    def _aligned_view(self, node: Node, literals: list[tuple[tuple[Any, ...], int]]) -> Iterator[Reading]:
        """Line the output's axes up with the input's, group by group of equal products, left to right."""
        source: Any = node.args[0]
        if node not in self.original.values:
            self.original.step(node)
        before = tuple(self.original.values[source].shape)
        after = tuple(self.original.values[node].shape)
        known = [self._extent_of_axis(source, i) for i in range(len(before))]
        extents = [e for e in known if e is not None]
        if len(extents) < len(known):
            return
        found: dict[int, Extent] = {}
        for ins, outs in _groups(before, after):
            wide = [o for o in outs if after[o] != 1]
            whole = Extent(const=1)
            for i in ins:
                product = whole * extents[i]
                if product is None:
                    return
                whole = product
            if len(wide) == 1:
                found[wide[0]] = whole
            elif not whole.is_const and not self._split(whole, [(o, after[o]) for o in wide], found):
                return
        reading = [(path, found[path[1]]) for path, _ in literals if path[1] in found]
        yield tuple((p, e) for p, e in reading if not e.is_const)

    def _split(self, whole: Extent, outs: list[tuple[int, int]], found: dict[int, Extent]) -> bool:
        """Give the batch, then the length in ``whole`` to the first axis of that size; the others are constants."""
        wanted = [Extent(batch=1)] if whole.batch or whole.tokens else []
        wanted += [Extent(length=1)] if whole.length or whole.tokens else []
        rest = list(outs)
        for extent in wanted:
            size = extent.at(self.original.batch, self.original.length)
            place = next((o for o in rest if o[1] % size == 0), None)
            if place is None:
                return False
            rest.remove(place)
            found[place[0]] = extent.times(place[1] // size)
        found.update({o: Extent(const=size) for o, size in rest})
        return True


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of input and output axes with equal products: (8, 128, 768) and (8, 128, 12, 64) give three."""
    i = j = 0
    while i < len(before) or j < len(after):
        ins: list[int] = []
        outs: list[int] = []
        m = n = 1
        while True:
            if m <= n and i < len(before) and (m < n or not ins):
                m *= before[i]
                ins.append(i)
                i += 1
            elif j < len(after) and (n < m or not outs):
                n *= after[j]
                outs.append(j)
                j += 1
            else:
                break
            if m == n and ins and outs and m != 1:
                break
        yield ins, outs


def _agree(original: Any, first: Any, second: Any) -> bool:
    """Whether sizes at the two probes can come from one formula that also gives the original."""
    if isinstance(original, (tuple, list)):
        same_length = isinstance(first, (tuple, list)) and len(original) == len(first) == len(second)
        return same_length and all(itertools.starmap(_agree, zip(original, first, second, strict=True)))
    if isinstance(first, (int, float)) and isinstance(original, (int, float)):
        return first != second or original == first
    return type(original) is type(first)


def _with_reading(node: Node, reading: Reading, probe: Probe) -> tuple[Any, Any]:
    if not reading:
        return node.args, node.kwargs
    return _substitute(node, {p: e.at(probe.batch, probe.length) for p, e in reading})


def _substitute(node: Node, values: dict[tuple[Any, ...], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args]
    kwargs: dict[str, Any] = {k: list(a) if isinstance(a, (list, tuple)) else a for k, a in node.kwargs.items()}
    for (key, *inner), value in values.items():
        holder: Any = kwargs if isinstance(key, str) else args
        if inner:
            holder[key][inner[0]] = value
        else:
            holder[key] = value
    return tuple(args), kwargs


def _cut_tables(gm: GraphModule, inputs: ModelInputs, node: Node, tables: dict[Node, int]) -> int:
    """``x + table`` -> ``x + table[:, :S]``."""
    with gm.graph.inserting_before(node):
        length = gm.graph.call_function(aten.sym_size.int, (inputs.tokens, 1))
        length.meta["val"] = fake_value(inputs.tokens).shape[1]
        for table, axis in tables.items():
            cut = gm.graph.call_function(aten.slice.Tensor, (table, axis, 0, length))
            cut.meta["val"] = fake_value(table)
            node.replace_input_with(table, cut)
    return len(tables)


def _materialise(gm: GraphModule, inputs: ModelInputs, readings: dict[Node, Reading]) -> int:
    """Write the readings into the graph as arithmetic on ``sym_size`` of the tokens."""
    if not readings:
        return 0
    graph = gm.graph
    last_placeholder = list(graph.find_nodes(op="placeholder"))[-1]
    made: dict[Any, Node] = {}
    batch, length = fake_value(inputs.tokens).shape[:2]

    def emit(key: Any, target: Any, args: Any, value: int) -> Node:
        if key not in made:
            made[key] = graph.call_function(target, args)
            made[key].meta["val"] = value
        return made[key]

    def row_count() -> Node:
        return emit("batch", aten.sym_size.int, (inputs.tokens, 0), batch)

    def row_length() -> Node:
        return emit("length", aten.sym_size.int, (inputs.tokens, 1), length)

    def token_count() -> Node:
        return emit("tokens", operator.mul, (row_count(), row_length()), batch * length)

    def compute(extent: Extent) -> Any:
        value = extent.at(concrete(batch, {}), concrete(length, {}))
        total: Any = extent.const
        terms = ((row_length, extent.length), (row_count, extent.batch), (token_count, extent.tokens))
        for unit, factor in terms:
            if not factor:
                continue
            term = unit()
            if factor != 1:
                term = emit((unit, factor), operator.mul, (term, factor), int(term.meta["val"]) * factor)
            total = term if total == 0 else emit(extent, operator.add, (term, total), value)
        return total

    with graph.inserting_after(last_placeholder):
        anchor = graph.create_node("call_function", operator.add, (0, 0))
    with graph.inserting_before(anchor):
        filled = {n: {p: compute(e) for p, e in reading} for n, reading in readings.items()}
    graph.erase_node(anchor)
    for node, values in filled.items():
        node.args, node.kwargs = _substitute(node, values)
    return sum(map(len, readings.values()))
