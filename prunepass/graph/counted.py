"""Sizes that a graph counts itself: numbers that it reads out of a tensor, such as the tokens that a level keeps.

`torch.export` knows nothing of such a number and asks at each operator whether it is 0 or 1. So it is told that the
number is at least 2, as it takes the sizes of inputs to be; the programs hold for 1 as well, as they do for inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from prunepass.graph.kinds import is_assertion
from prunepass.graph.wrappers import MARK

__all__ = ["as_sizes", "counted", "without_checks"]

_ITEM = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def counted(gm: GraphModule) -> list[Node]:
    """The numbers that our passes have the graph read out of tensors."""
    return [node for node in gm.graph.nodes if node.target in _ITEM and _is_marked(node)]


@contextmanager
def as_sizes(gm: GraphModule) -> Iterator[None]:
    """Inside, a tracer takes the numbers of `counted` for sizes of at least 2. Edits the graph and puts it back."""
    added: list[Node] = []
    for node in counted(gm):
        with gm.graph.inserting_after(node):
            holds = gm.graph.call_function(operator.ge, (node, 2))
        with gm.graph.inserting_after(holds):
            check = gm.graph.call_function(torch.ops.aten._assert_scalar.default, (holds, "a size"))
        added += [check, holds]
    if added:
        gm.recompile()
    try:
        yield
    finally:
        for node in added:
            gm.graph.erase_node(node)
        if added:
            gm.recompile()


def without_checks(program: ExportedProgram) -> ExportedProgram:
    """A program without the checks of such numbers that tracing leaves in it, which do not hold for 1. In place."""
    numbers = set(counted(program.graph_module))
    if not numbers:
        return program
    for node in program.graph.nodes:
        if any(a in numbers for a in node.all_input_nodes) and not _is_tensor(node):
            numbers.add(node)
    for node in [n for n in program.graph.nodes if is_assertion(n)]:
        if any(a in numbers for a in node.all_input_nodes):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _is_marked(node: Node) -> bool:
    return MARK in node.meta or MARK in (node.meta.get("custom") or {})


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
