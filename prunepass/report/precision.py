"""What a target computes in: a runtime may choose fewer bits than the weights have, by what the CPU can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["computes_in"]

#: features of x86 CPUs that compute in bfloat16, as Linux names them, the fastest first
_BF16 = ("amx_bf16", "avx512_bf16")
_HINT = "INFERENCE_PRECISION_HINT"


def computes_in(target: Any, model: nn.Module, config: Mapping[str, Any] | None = None) -> str:
    """The precision of matrix products on ``target``, and what decides it, in words for a reader.

    Args:
        target: a name, or a target of one's own, which is taken to compute as the weights are.
        config: the target's own settings.

    Raises:
        MissingExtraError: the target is OpenVINO, which is not installed.
    """
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if target != "openvino":
        return f"{str(weights).removeprefix('torch.')}, as the weights are"
    return _of_openvino(dict(config or {}))


def _of_openvino(config: dict[str, Any]) -> str:
    from prunepass.backends._openvino_core import core, require

    ov = require()
    from openvino import opset13 as ops

    device = str(config.pop("DEVICE", "CPU"))
    config.pop("CACHE_DIR", None)
    x = ops.parameter([1], ov.Type.f32)
    try:
        compiled = core().compile_model(ov.Model([ops.relu(x)], [x]), device, config)
        name = str(compiled.get_property(_HINT).get_type_name())
    except (RuntimeError, AttributeError):  # a wrong setting: the model itself is refused with the reason
        return "unknown: OpenVINO does not take the settings"
    if _HINT in config:
        return f"{name}, as {_HINT} says"
    features = [feature for feature in _BF16 if feature in _cpu_features()]
    if name == "bf16" and features:
        return f"bf16, OpenVINO's default where the CPU has {features[0]}; {_HINT}=f32 asks for float32"
    if name == "f32" and device == "CPU" and not features:
        return f"f32, OpenVINO's default where the CPU has neither {' nor '.join(_BF16)}"
    return f"{name}, OpenVINO's default with these settings"


def _cpu_features() -> frozenset[str]:
    """Of the first core, on Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
