"""The readings that fit one node's literals, likeliest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.extents import Extent, Reading
from prunepass.graph.ops import int_argument
from prunepass.graph.sizes import Probe

__all__ = ["VIEWS", "Readings"]

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
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


class Readings:
    """Proposes readings, from what a node's inputs measure in the traced call and at both probes.

    Attributes:
        with_literals: nodes that have something to read.
        from_data: nodes that depend on the model's inputs, not on weights alone.
    """

    def __init__(self, original: Probe, first: Probe, second: Probe, static: tuple[bool, bool]) -> None:
        self.original, self.first, self.second = original, first, second
        self.static_batch, self.static_length = static
        self.is_front = False  # of a fixed number of tokens: before them nothing follows it
        self.with_literals: set[Node] = set()
        self.from_data: set[Node] = set()

    def of(self, node: Node) -> Iterator[Reading]:
        literals = self._literals(node)
        if not literals:
            return iter([()])
        self.with_literals.add(node)
        if node.target in VIEWS:
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
        if not (self.static_batch or (self.static_length and not self.is_front)):
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
        static_length = self.static_length and not self.is_front
        b, s = self.original.batch, self.original.length
        if static_length and value == s:
            out.append(Extent(length=1))
        if self.static_batch and value == b:
            out.append(Extent(batch=1))
        if static_length and abs(value) > 1:
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
            if node.target is aten.slice.Tensor and value < 0:  # the last n: a window, or as many as there are tokens
                rest = [e for e in rest if e == Extent(length=-1)]
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
