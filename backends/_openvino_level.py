"""The input that chooses among several plans, with a default: OpenVINO's inputs have none of their own."""

from __future__ import annotations

from typing import Any

from prunepass.backends._openvino_core import require

__all__ = ["with_default"]


def with_default(model: Any, name: str, default: int) -> None:
    """``f(level)`` -> ``f(concat([level, default])[0])`` in an ``openvino.Model``, where ``level`` is [0 or 1] int64.

    An input of open size that a request was never given is empty when it runs (seen in OpenVINO 2026.4, CPU), so that
    the default is what is left. Once given, a request keeps its level for the calls after it, as it does any input.
    """
    ov = require()
    op = ov.opset13
    (old,) = [
        p for p in model.get_parameters() if name in (p.get_friendly_name(), *p.output(0).get_tensor().get_names())
    ]
    made = op.parameter(ov.PartialShape([ov.Dimension(0, 1)]), ov.Type.i64, name=name)
    both = op.concat([made, op.constant([default], ov.Type.i64)], 0)
    first = op.gather(both, op.constant([0], ov.Type.i64), op.constant(0, ov.Type.i64))
    old.output(0).replace(first.output(0))
    model.remove_parameter(old)
    model.add_parameters([made])
    model.validate_nodes_and_infer_types()
