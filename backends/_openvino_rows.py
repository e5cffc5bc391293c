"""Rows of OpenVINO's files: masks of one row hold for all, as in PyTorch, and images and sounds may come in none.

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

__all__ = ["open_batch", "widen_masks"]


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


def open_batch(model: Any) -> None:
    """Let images and sounds come in batches of any size, none among them, in place.

    torch.export says "at least 1" of an open batch, and OpenVINO then refuses an empty one. openvino-genai's
    WhisperPipeline sends one before the first clip, to learn the shape of what the encoder puts out. Models whose
    inputs have more than one open size are left alone: of a text's counts nothing is promised without a row.
    """
    shapes = {port: port.get_partial_shape() for port in model.inputs}
    if not all(_open_in_rows_alone(shape) for shape in shapes.values()):
        return
    for shape in shapes.values():
        shape[0] = -1
    model.reshape(shapes)


def _open_in_rows_alone(shape: Any) -> bool:
    rows, *others = shape
    return len(others) >= 2 and rows.is_dynamic and all(size.is_static for size in others)
