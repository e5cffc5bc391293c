"""Tokens and positions outside the tables that a model looks them up in: told before a runtime runs on rubbish.

PyTorch and ONNX Runtime raise for such an index, OpenVINO reads something else. A text longer than a learned table of
positions is the common case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from prunepass.errors import OptionError
from prunepass.graph.flow import ancestors
from prunepass.graph.inputs import ALIASES, fake_value, input_name, is_parameter
from prunepass.graph.modules import module_path
from prunepass.graph.ops import is_mutable
from prunepass.graph.views import VIEWS

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["Lookups", "checked"]

#: functions that look up, with the names of their first two arguments
_LOOKUPS: dict[Any, tuple[str, str]] = {
    torch.ops.aten.embedding.default: ("weight", "indices"),
    torch.embedding: ("weight", "input"),
    F.embedding: ("input", "weight"),
}
#: functions of `operator` that write, as Dynamo puts them into a graph
_IN_PLACE = {"setitem", *(f"i{name}" for name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"))}


def checked(lowered: Callable[..., Any], lookups: Lookups | None, *, before: bool) -> Callable[..., Any]:
    """``lowered`` with a message that says which index lies outside of which table.

    Args:
        lowered: takes what the graph takes.
        lookups: those of the graph that was lowered.
        before: look before each call, for a runtime that does not tell; else only where a call fails.
    """
    if lookups is None:
        return lowered

    def run(*args: Any) -> Any:
        if before:
            lookups.check(args)
        try:
            return lowered(*args)
        except Exception:  # runtimes have classes of their own
            lookups.check(args)
            raise

    return run


class Lookups:
    """The indices that a graph looks up in tables, each as a small graph of its own.

    Only those that come of whole numbers alone are there (ids, masks, lengths): they take microseconds.
    """

    def __init__(self, indices: list[GraphModule], tables: list[tuple[str, str, int]]) -> None:
        self._indices, self._tables = indices, tables

    @classmethod
    def of(cls, gm: GraphModule) -> Lookups | None:
        """Those of ``gm``; None where it has none that can be checked."""
        found, written = {}, _written(gm.graph)
        for node in gm.graph.nodes:
            lookup = _lookup(node)
            if lookup is not None and _of_whole_numbers(lookup[0]) and not written & ancestors(lookup[0]):
                found[lookup] = node
        if not found:
            return None
        indices = [_alone(gm, index) for index, _ in found]
        tables = [(_given(index), module_path(node), rows) for (index, rows), node in found.items()]
        return cls(indices, tables)

    def check(self, args: tuple[Any, ...]) -> None:
        """Raises `OptionError` where an index of a call lies outside of its table.

        Args:
            args: what the graph is called with.
        """
        for computed, (given, module, rows) in zip(self._indices, self._tables, strict=True):
            try:
                index = computed(*args)
                least, most = (int(n) for n in index.aminmax()) if index.numel() else (0, 0)
            except (IndexError, RuntimeError):  # it reads a table itself, at an index that another entry is about
                continue
            if least >= 0 and most < rows:
                continue
            where = f" ({module})" if module else ""
            wrong = most if most >= rows else least
            if given and "position" not in given:
                raise OptionError(
                    f"A token id of {given} is {wrong}, and the table that it is looked up in{where} has rows 0 to "
                    f"{rows - 1}. Use the tokenizer that belongs to the model."
                )
            raise OptionError(
                f"A token stands at position {wrong}, and the model's table of positions{where} has {rows} rows. Give "
                "it shorter texts: truncation=True in the tokenizer's call cuts them."
            )


def _alone(gm: GraphModule, index: Node) -> GraphModule:
    """What computes one value, with all inputs of the graph."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = ancestors(index)
    for node in gm.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[index])
    return fx.GraphModule(gm, graph)


def _lookup(node: Node) -> tuple[Node, int] | None:
    """The index that a node looks up, and the rows of its table."""
    if node.op != "call_function" or node.target not in _LOOKUPS:
        return None
    names = _LOOKUPS[node.target]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    index, table = (given[name] for name in sorted(names))  # indices and input stand before weight in the alphabet
    if not (isinstance(index, fx.Node) and isinstance(table, fx.Node)):
        return None
    value, rows = fake_value(index), fake_value(table)
    if not (isinstance(value, Tensor) and isinstance(rows, Tensor) and isinstance(rows.shape[0], int)):
        return None
    return index, rows.shape[0]


def _written(graph: fx.Graph) -> set[Node]:
    """Whole numbers and flags that something may write into: a copy of what computes them would write a second time,
    or leave out what is written."""
    found: set[Node] = set()
    for node in graph.nodes:
        into = node.args[0] if _writes(node) and node.args else None
        while isinstance(into, fx.Node) and isinstance(v := fake_value(into), Tensor) and not v.is_floating_point():
            found.add(into)
            into = into.args[0] if into.op != "placeholder" and into.args else None  # it may be a view of that
    return found


def _writes(node: Node) -> bool:
    """Whether a node changes its first argument, in ATen's dialect or Dynamo's."""
    if isinstance(node.target, torch._ops.OpOverload):
        return is_mutable(node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_function", "call_method") and (in_place or name in _IN_PLACE)


def _of_whole_numbers(index: Node) -> bool:
    """Whether all that an index is made of are lengths and tensors of whole numbers or flags, of two axes at most, and
    something of it is known at a call only."""
    open_ended = False
    for node in ancestors(index):
        value = fake_value(node)
        if isinstance(value, Tensor):
            if value.is_floating_point() or value.is_complex() or value.dim() > 2:
                return False
            open_ended |= node.op == "placeholder" and not is_parameter(node)
        elif not isinstance(value, int | torch.SymInt):
            return False
        else:
            open_ended |= isinstance(value, torch.SymInt)
    return open_ended


def _given(index: Node) -> str:
    """The input that an index is, cast or seen otherwise; "" where it is computed."""
    while index.op == "call_function" and (index.target in ALIASES or index.target in VIEWS):
        index = index.all_input_nodes[0]
    if index.op != "placeholder":
        return ""
    name = input_name(index)
    return name if name.isidentifier() else "the input"  # Dynamo's L['args'][0]
