"""One place to read the batch and the length from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from prunepass.graph.inputs import fake_value
from prunepass.graph.sizes import Axis, AxisKind
from prunepass.passes.state import Rewrite

__all__ = ["ReadSizesFromInputs"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ReadSizesFromInputs:
    """``sym_size(h, 1)`` -> ``sym_size(ids, 1)`` for every h that has the length on that axis.

    A size read off a hidden state means the length of the text: positions counted by it must stay the original ones
    when the hidden state gets shorter.
    """

    name = "sizes"

    def run(self, rewrite: Rewrite) -> int:
        """Returns the number of reads moved."""
        tokens, sizes, count = rewrite.inputs.tokens, rewrite.sizes, 0
        made: dict[int, Node] = {}
        for node in list(rewrite.graph.find_nodes(op="call_function", target=aten.sym_size.int)):
            axis = {Axis(AxisKind.SEQ): 1, Axis(AxisKind.BATCH): 0}.get(sizes.number(node) or Axis(AxisKind.CONST))
            if axis is None or node.args[0] is tokens:
                continue
            if axis not in made:
                with rewrite.graph.inserting_after(rewrite.last_placeholder):
                    made[axis] = rewrite.graph.call_function(aten.sym_size.int, (tokens, axis))
                made[axis].meta["val"] = fake_value(tokens).shape[axis]
                for probe in (sizes.first, sizes.second):
                    probe.step(made[axis])
            node.replace_all_uses_with(made[axis])
            rewrite.graph.erase_node(node)
            count += 1
        return count
