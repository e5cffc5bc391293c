"""A model in int8 on OpenVINO, as `prunepass.export` writes it, to be scored and timed like the others."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.backends._openvino_core import core
from prunepass.backends._tensors import to_numpy
from prunepass.export.folder import export
from prunepass.plan import PrunePlan

__all__ = ["CALIBRATION", "Quantised"]

#: rows that ranges are measured on, of all lengths, at most
CALIBRATION = 64


class Quantised:
    """Called with the model's inputs by name, it gives its outputs by name.

    Args:
        model: dense.
        plan: what it is pruned by; without stages, it stays dense.
        batches: the model's inputs, to measure ranges on.
        example: the model's inputs, of two rows.
        config: OpenVINO's own settings.

    Raises:
        MissingExtraError: openvino or nncf is not installed.
        ExportError, RefusalError: as `export`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PrunePlan,
        batches: Sequence[Mapping[str, Tensor]],
        example: Mapping[str, Tensor],
        config: Mapping[str, Any],
    ) -> None:
        # the runtime may read weights from the file for as long as it has the model
        self._work = tempfile.TemporaryDirectory(prefix="prunepass-int8-")
        folder = Path(self._work.name) / "model"
        export(model, plan, folder, to="openvino", int8=batches, example_inputs=dict(example), stateful=False)
        compiled = core().compile_model(str(folder / "openvino_model.xml"), "CPU", dict(config))
        self._request = compiled.create_infer_request()
        self._takes = [port.get_any_name() for port in compiled.inputs]
        self._gives = [port.get_any_name() for port in compiled.outputs]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self._request.infer({name: to_numpy(inputs[name]) for name in self._takes})
        # the next call writes where these lie
        return {name: torch.from_numpy(value.copy()) for name, value in zip(self._gives, found.values(), strict=True)}
