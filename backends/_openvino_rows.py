"""Masks of one row in OpenVINO's files: they hold for all rows, as in PyTorch.

OpenVINO checks no input against another. A mask of one row beside ids of several would hide tokens in one part of the
model and be counted wrongly in another, with no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunepass.backends._programs import Shapes
from prunepass.graph.inputs import MASK_NAMES

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["widen_masks"]


def widen_masks(model: Any, program: ExportedProgram, names: Sequence[str]) -> None:
    """Broadcast each mask [B, S] to the shape of the ids [B, S], in place; other sizes fail at the call.

    Args:
        model: an ``openvino.Model`` of ``program``.
        names: of the inputs, in order.
    """
    import openvino.opset13 as ops

    if "input_ids" not in names:
        return
    shapes = dict(zip(names, Shapes.of(program).inputs, strict=True))
    ports = dict(zip(names, model.inputs, strict=True))
    for name in MASK_NAMES:
        if shapes.get(name) != shapes["input_ids"]:
            continue
        readers = list(ports[name].get_target_inputs())
        wide = ops.broadcast(ports[name], ops.shape_of(ports["input_ids"]))
        for reader in readers:
            reader.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()
