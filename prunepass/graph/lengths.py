"""Making the length of a static graph a value again.

Dynamo first compiles a model for the lengths of its first call and bakes them in as integers: ``view(x, [8, 128,
12, 64])``. Nothing says which 128 is the length and which a width. We ask the graph: it is replayed on meta tensors at
other batches and lengths, literal by literal. Most literals have one reading that fits (a ``view`` must line up with
its input's axes, an ``expand`` with those it does not stretch); where several do, they are tried in order of likelihood
and a later operation that does not fit sends the search back to the choice that it depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.errors import RefusalError
from prunepass.graph.extents import Reading, cut_tables, materialise, with_reading
from prunepass.graph.fixed import FixedLength, in_order
from prunepass.graph.flow import ancestors
from prunepass.graph.inputs import ModelInputs, check_mask_fits, fake_value, is_symbolic
from prunepass.graph.ops import is_pointwise
from prunepass.graph.readings import VIEWS, Readings
from prunepass.graph.reasons import no_replay
from prunepass.graph.sizes import Probe, Sizes, concrete, quiet_fakes, shape_of

__all__ = ["resolve_lengths"]

aten = torch.ops.aten
_KEEPS_VALUES = {
    *VIEWS,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.add.Tensor,  # transformers adds an offset, 0 without a cache
    aten.to.dtype,
    aten.to.device,
    aten.alias.default,
    aten.expand.default,
}
_MAX_BACKTRACKS = 500


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
        RefusalError: a length is baked into a place that has no consistent reading, or the mask has another length.
    """
    check_mask_fits(inputs)
    batch, length = fake_value(inputs.tokens).shape[:2]
    static = isinstance(batch, int) and batch > 1, isinstance(length, int)
    if inputs.made_from is not None:
        batch = fake_value(inputs.rows).shape[0]
        batch = batch if is_symbolic(batch) else int(batch)  # the tracer may have fixed what it took as open at first
        static = isinstance(batch, int) and batch > 1, inputs.fixed_length is not None
    at_batch, at_length = concrete(batch, {}), concrete(length, {})
    error: RefusalError | None = None
    sizes = list(_probe_sizes(at_batch, at_length, fixed_batch=batch == 1))
    if inputs.fixed_length is not None:
        # what was made for the model's own number of tokens is cut to a probe's, never grown
        sizes = [pair for pair in sizes if max(length for _, length in pair) <= inputs.fixed_length]
    if not sizes:
        raise RefusalError(f"the model has {at_length} tokens whatever it is given, too few to leave some out.")
    for (b1, s1), (b2, s2) in sizes:
        first, second = Probe(gm, inputs, b1, s1), Probe(gm, inputs, b2, s2)
        solver = _Solver(gm, Probe(gm, inputs, at_batch, at_length) if any(static) else None, first, second, static)
        try:
            with quiet_fakes():
                readings = solver.solve()
                solver.fixed.check(readings)
        except RefusalError as e:  # a length that the model does not take, such as one over its position table
            if error is not None and error.where == e.where and s1 < at_length:
                break
            error = error or e
            continue
        count = materialise(gm, inputs, readings)
        for node, slices in solver.tables.items():
            count += cut_tables(gm, inputs, node, slices)
        for node in gm.graph.nodes if count else ():
            if node not in first.values:
                first.step(node)
                second.step(node)
        return Sizes(first, second, solver.whole), count
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
        self.nodes = in_order(gm.graph, first._inputs)
        self.fixed = FixedLength(self.original, first, second, self.nodes)
        self.whole = self.fixed.whole
        self.proposals = Readings(self.original, first, second, static)
        self.readings: dict[Node, Reading] = {}
        self.tables: dict[Node, dict[Node, int]] = {}  # consumer -> table made for exactly this length -> its axis

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
                choice = _Choice(position, self.proposals.of(node))
                if node in self.proposals.with_literals:
                    choices.append(choice)
            failure = self._try(node, choice.readings)
            if failure is None:
                position += 1
                continue
            if failure and position > furthest.position:
                furthest = _Failure(position, failure)
            steps += 1
            blame = ancestors(node) | choice.blame
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
        given = (*self.original._inputs.sequence, self.original._inputs.rows)
        if node in given or any(a in self.proposals.from_data for a in node.all_input_nodes):
            self.proposals.from_data.add(node)

    def _try(self, node: Node, readings: Iterator[Reading]) -> str | None:
        """Evaluate the node with the next reading that fits. None on success, else why the last one did not."""
        failure = ""
        self.proposals.is_front = node in self.fixed.front
        if self.fixed.is_behind_whole(node):
            return self.fixed.take_whole(node)
        for reading in readings:
            failure = self._failure(node, reading)
            if failure and not (self._with_tables_cut(node) or self._with_sides_cut(node, reading)):
                continue
            if self._consistent(node):
                self.readings[node] = reading
                return None
            failure = "its size does not follow the length"
        if failure and self.fixed.may_be_whole(node):
            return self.fixed.take_whole(node)
        return failure

    def _failure(self, node: Node, reading: Reading) -> str:
        """Evaluate the node with one reading: "" on success, else why it did not go."""
        try:
            if node not in self.original.values:
                self.original.step(node)
            for probe in (self.first, self.second):
                probe.step(node, *with_reading(node, reading, probe))
            self.tables.pop(node, None)
        except Exception as e:  # fake kernels raise whatever the operator raises
            return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
        return ""

    def _consistent(self, node: Node) -> bool:
        sizes = [shape_of(p.values[node]) for p in (self.original, self.first, self.second)]
        return _agree(*sizes) and (node.target is not aten.index.Tensor or self._index_fits(node))

    def _with_tables_cut(self, node: Node) -> bool:
        """Evaluate ``x + table`` where the table, made of weights alone, has exactly the traced length: at the longest
        length that a model takes, its ``table[:, :S]`` does nothing and leaves no trace."""
        if not self.proposals.static_length or not is_pointwise(node) or self.first.length >= self.original.length:
            return False
        if self.fixed.length is not None:
            return False
        axes = {}
        for a in node.all_input_nodes:
            shape = tuple(getattr(self.original.values[a], "shape", ()))
            if a not in self.proposals.from_data and self.original.length in shape:
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

    def _with_sides_cut(self, node: Node, reading: Reading) -> bool:
        """Evaluate a node that reads what was made for a fixed number of tokens, cut to the probes' lengths."""
        return any(not self._failure(node, reading) for _ in self.fixed.cuts(node))

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

    def _refusal(self, failure: _Failure) -> RefusalError:
        node = self.nodes[failure.position]
        if (reason := self.fixed.refusal(node, failure.message)) is not None:
            return reason
        before = sorted(ancestors(node) - {node})
        sizes = Sizes(self.first, self.second)
        return no_replay(node, failure.message, before, sizes, self.original.length)


def _agree(original: Any, first: Any, second: Any) -> bool:
    """Whether sizes at the two probes can come from one formula that also gives the original."""
    if isinstance(original, (tuple, list)):
        same_length = isinstance(first, (tuple, list)) and len(original) == len(first) == len(second)
        return same_length and all(itertools.starmap(_agree, zip(original, first, second, strict=True)))
    if isinstance(first, (int, float)) and isinstance(original, (int, float)):
        return first != second or original == first
    return type(original) is type(first)
