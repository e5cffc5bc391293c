"""Gated feed-forward parts on one thread, in less than float32.

There OpenVINO's CPU plugin ended the process (https://github.com/openvinotoolkit/openvino/issues/33300) in its own
kernel for ``down(act(gate(x)) * up(x))``. It does not know the part with a clamp behind the activation, which costs
nothing: the plugin computes it together with the activation.
"""

from __future__ import annotations

from typing import Any

__all__ = ["divides_by_zero", "keep_apart"]

_ACTIVATIONS = ("Swish", "Gelu")
#: float32's largest number to four digits, which bfloat16 has room for
_LARGEST = 3.389e38


def divides_by_zero(core: Any, device: str, properties: dict[str, Any]) -> bool:
    """Whether the plugin, with these properties, would have one thread and compute in less than float32."""
    from openvino import Model, Type
    from openvino import opset13 as ops

    if device != "CPU":
        return False
    x = ops.parameter([1], Type.f32)
    properties = {name: value for name, value in properties.items() if name != "CACHE_DIR"}  # nothing worth keeping
    try:
        compiled = core.compile_model(Model([ops.relu(x)], [x]), device, properties)
        threads, precision = (compiled.get_property(n) for n in ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT"))
    except RuntimeError:  # a property is wrong: the model itself is refused with the reason
        return False
    return bool(threads == 1 and precision != Type.f32)


def keep_apart(model: Any) -> int:
    """Put the clamps into an ``openvino.Model``, in place. Values stay what they are, but for infinite ones. Returns
    how many there are."""
    from openvino import opset13 as ops

    count = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() not in _ACTIVATIONS:
            continue
        ports = [p for p in op.output(0).get_target_inputs() if p.get_node().get_type_name() == "Multiply"]
        if ports:
            clamped = ops.clamp(op.output(0), -_LARGEST, _LARGEST)
            for port in ports:
                port.replace_source_output(clamped.output(0))
            count += 1
    return count
