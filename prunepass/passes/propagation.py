"""The size of every value of a graph on its way, for contracts: it is run on tensors without data.

Each stage's K is taken for a number of its own, below the length and different at each stage, so that a value that
still follows the full length, or another stage's, is told from one that follows K by its size alone. What may read the
full length needs no list: what we add (counts, masks of original positions, gathering, restoring) may have any size,
and each value of the model must have its old one with K in place of the length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from prunepass.graph.kinds import is_assertion
from prunepass.graph.sizes import Axis, AxisKind, Probe, quiet_fakes, shape_of
from prunepass.passes.contract import Fault, is_ours
from prunepass.passes.state import Rewrite

__all__ = ["result_faults", "size_faults"]


def size_faults(state: Rewrite, level: int | None = None) -> Iterator[Fault]:
    """Values of the model whose size is not the old one with the gathered length in place of the full one.

    Args:
        level: the cuts that were narrowed so far; what lies below others is left out. None for all of a whole graph.
    """
    found = _Propagation.of(state, level)
    with quiet_fakes():
        yield from found.run()


def result_faults(state: Rewrite) -> Iterator[Fault]:
    """`size_faults` of a whole graph, and results that do not have the shape and the dtype that they had."""
    found = _Propagation.of(state, None)
    with quiet_fakes():
        yield from found.run()
    for place, (old, new) in enumerate(zip(state.outputs, state.results(), strict=False)):  # a mask may follow them
        if not isinstance(old, Node) or not isinstance(new, Node):
            continue
        before, after = found.dense.values.get(old), found.probe.values.get(new)
        level = len(state.sites) if old in state.short else state.level.get(old, 0)
        wanted = found.expected(old, level) if old in (*state.cached, *state.short) else shape_of(before)
        if shape_of(after) != wanted:
            yield Fault(f"Result {place} has the shape {shape_of(after)} in place of {wanted}.", new)
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype != after.dtype:
            yield Fault(f"Result {place} is {after.dtype} in place of {before.dtype}.", new)


@dataclass
class _Propagation:
    state: Rewrite
    level: int | None
    dense: Probe
    probe: Probe
    lengths: list[int]  # by level
    widths: dict[Node, int]
    touched: set[Node] = field(default_factory=set)
    skipped: set[Node] = field(default_factory=set)

    @classmethod
    def of(cls, state: Rewrite, level: int | None) -> _Propagation:
        # the longer of the two probes leaves room for more stages
        dense = max(state.sizes.first, state.sizes.second, key=lambda probe: probe.length)
        probe = copy.copy(dense)
        probe.values = dict(dense.values)
        lengths = [dense.length] * (len(state.sites) + 1)
        widths: dict[Node, int] = {}
        for i, site in enumerate(state.sites, start=1):
            if state.mode == "gather" and site.width is not None:
                lengths[i] = widths[site.width] = max(1, dense.length - i)
        return cls(state, level, dense, probe, lengths, widths)

    def run(self) -> Iterator[Fault]:
        for node in self.state.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output") or is_assertion(node):
                if node not in self.probe.values and node.op == "get_attr":
                    self.probe.step(node)
                continue
            if self._waits(node):
                self.skipped.add(node)
                continue
            fault = self._step(node)
            if fault is not None:
                yield fault
                self.skipped.add(node)

    def _waits(self, node: Node) -> bool:
        """Whether a node lies below a cut that is not narrowed yet, or behind the end of a stream not restored yet."""
        if any(a in self.skipped for a in node.all_input_nodes):
            return True
        if self.level is None or is_ours(node):
            return False
        own = self.state.level.get(node, 0)
        return own > self.level or any(self.state.level.get(a, 0) > own for a in node.all_input_nodes)

    def _step(self, node: Node) -> Fault | None:
        if node in self.widths:
            self.probe.values[node] = self.widths[node]
            self.touched.add(node)
            return None
        known = node in self.dense.values
        if known and not any(a in self.touched for a in node.all_input_nodes):
            return None
        self.touched.add(node)
        if node.op == "call_module":  # a gate gives what it takes first
            self.probe.values[node] = self.probe.values[node.all_input_nodes[0]].float()
            return None
        try:
            value = self.probe.step(node)
        except Exception as e:  # torch raises many kinds where sizes do not fit
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            self.probe.values[node] = self.dense.values.get(node)
            return Fault(f"It cannot run on what it gets ({lines[0] if lines else type(e).__name__}).", node)
        if not known or is_ours(node) or isinstance(value, bool):
            return None
        wanted, got = self.expected(node, self.state.level.get(node, 0)), shape_of(value)
        if not _fits(got, wanted):
            return Fault(f"It has the size {got} in place of {wanted}: what it reads is of another length.", node)
        return None

    def expected(self, node: Node, level: int) -> Any:
        """The size of a value of the model at its level; None for an axis of which it cannot be said."""
        if level and node in self.state.slices:
            return None  # as many of the last tokens as there are
        length = self.state.thinned.get(node, self.lengths[level])
        first, second = (self.state.sizes.first.values.get(node), self.state.sizes.second.values.get(node))
        return self._sized(first, second, self.dense.values.get(node), length)

    def _sized(self, first: Any, second: Any, dense: Any, length: int) -> Any:
        if isinstance(dense, (tuple, list)):
            return [self._sized(*three, length) for three in zip(first, second, dense, strict=True)]
        axes = self.state.sizes.axes_between(first, second)
        if axes is not None:
            return tuple(self._size(axis, n, length) for axis, n in zip(axes, dense.shape, strict=True))
        return None  # numbers show in the sizes that are made of them

    def _size(self, axis: Axis, dense: int, length: int) -> int | None:
        if not axis.follows_length:
            return dense
        if axis.kind is AxisKind.DERIVED:
            return dense if length == self.dense.length else None
        return axis.factor * length * (self.dense.batch if axis.kind is AxisKind.TOKENS else 1)


def _fits(got: Any, wanted: Any) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(_fits, got, wanted))
    if isinstance(got, tuple) and isinstance(wanted, tuple):
        return len(got) == len(wanted) and all(b is None or a == b for a, b in zip(got, wanted, strict=True))
    return bool(got == wanted)
