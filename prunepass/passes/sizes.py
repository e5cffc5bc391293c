"""One place to read the batch and the length from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from prunepass.graph.inputs import fake_value
from prunepass.graph.sizes import Axis, AxisKind
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.state import Rewrite

__all__ = ["ReadSizesFromInputs", "misread_sizes"]

aten = torch.ops.aten
#: numbers that the tokens give, and on which of their axes
_AXES = {Axis(AxisKind.SEQ): 1, Axis(AxisKind.BATCH): 0}


@dataclass(frozen=True)
class ReadSizesFromInputs(Pass):
    """``sym_size(h, 1)`` -> ``sym_size(ids, 1)`` for every h that has the length on that axis.

    A size read off a hidden state means the length of the text: positions counted by it must stay the original ones
    when the hidden state gets shorter.
    """

    name = "sizes"

    def run(self, state: Rewrite) -> int:
        """Returns the number of reads moved."""
        sizes, count = state.sizes, 0
        made: dict[int, Node] = {}
        for node in list(state.graph.find_nodes(op="call_function", target=aten.sym_size.int)):
            axis = _AXES.get(sizes.number(node) or Axis(AxisKind.CONST))
            if axis is None or not _is_misread(state, node, axis):
                continue
            if axis not in made:
                told, place = _read_at(state, axis)
                with state.graph.inserting_after(place):
                    made[axis] = state.graph.call_function(aten.sym_size.int, (told, axis))
                made[axis].meta["val"] = fake_value(told).shape[axis]
                for probe in (sizes.first, sizes.second):
                    probe.step(made[axis])
            node.replace_all_uses_with(made[axis])
            state.graph.erase_node(node)
            count += 1
        return count

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        return misread_sizes(state)


def misread_sizes(state: Rewrite) -> Iterator[Fault]:
    """Reads of the batch or the length from anything but the tokens."""
    for node in state.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        axis = _AXES.get(state.sizes.number(node) or Axis(AxisKind.CONST))
        if axis is not None and _is_misread(state, node, axis):
            yield Fault(f"It reads the {'length' if axis else 'batch'} from {node.args[0]}, not from the tokens.", node)


def _read_at(state: Rewrite, axis: int) -> tuple[Node, Node]:
    """What the batch (axis 0) or the length is read from, and after which node it can be."""
    if axis == 0 or state.inputs.made_from is None:
        return (state.inputs.rows if axis == 0 else state.inputs.tokens), state.last_placeholder
    return state.inputs.tokens, state.inputs.tokens


def _is_misread(state: Rewrite, node: Node, axis: int) -> bool:
    """Whether a size is read off a value that pruning may shorten: not in what makes the tokens, if the model does."""
    return node not in state.inputs.front and node.args[0] is not _read_at(state, axis)[0]
