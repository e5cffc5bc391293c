"""What an integer of a static graph can stand for, and how that is written into the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import ModelInputs, fake_value
from prunepass.graph.sizes import Probe, concrete

__all__ = ["Extent", "Reading", "cut_tables", "materialise", "with_reading"]

aten = torch.ops.aten


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


def with_reading(node: Node, reading: Reading, probe: Probe) -> tuple[Any, Any]:
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


def cut_tables(gm: GraphModule, inputs: ModelInputs, node: Node, tables: dict[Node, int]) -> int:
    """``x + table`` -> ``x + table[:, :S]``."""
    with gm.graph.inserting_before(node):
        length = gm.graph.call_function(aten.sym_size.int, (inputs.tokens, 1))
        length.meta["val"] = fake_value(inputs.tokens).shape[1]
        for table, axis in tables.items():
            cut = gm.graph.call_function(aten.slice.Tensor, (table, axis, 0, length))
            cut.meta["val"] = fake_value(table)
            node.replace_input_with(table, cut)
    return len(tables)


def materialise(gm: GraphModule, inputs: ModelInputs, readings: dict[Node, Reading]) -> int:
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
        if "batch" not in made:
            with graph.inserting_after(last_placeholder):
                emit("batch", aten.sym_size.int, (inputs.rows, 0), batch)
        return made["batch"]

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

    with graph.inserting_after(last_placeholder if inputs.made_from is None else inputs.source):
        anchor = graph.create_node("call_function", operator.add, (0, 0))
    with graph.inserting_before(anchor):
        filled = {n: {p: compute(e) for p, e in reading} for n, reading in readings.items()}
    graph.erase_node(anchor)
    for node, values in filled.items():
        node.args, node.kwargs = _substitute(node, values)
    return sum(map(len, readings.values()))
