"""Where `prunepass tune` runs what it tries: targets, and on each the precisions worth a try."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import nn

from prunepass.backends import get_target
from prunepass.errors import MissingExtraError, PruneError
from prunepass.report.precision import computes_in

__all__ = ["Setting", "settings_of", "targets"]

#: what is tried where nothing is said, and the packages that it takes
_TARGETS: Mapping[str, tuple[str, ...]] = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "inductor": (),
}
_HINT = "INFERENCE_PRECISION_HINT"


@dataclass(frozen=True)
class Setting:
    """A target with its settings.

    Attributes:
        config: the target's own settings.
        int8: whether matrix products run in int8.
    """

    target: str
    config: Mapping[str, str] = field(default_factory=dict)
    int8: bool = False

    def __str__(self) -> str:
        return " ".join([self.target, *(["int8"] if self.int8 else []), *self.config.values()])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"target": self.target, "config": dict(self.config), "int8": self.int8}


def targets(asked: Sequence[str] | None) -> list[str]:
    """Those asked for, or all that can run here.

    Raises:
        OptionError: a name that is no target.
        MissingExtraError: a target that is asked for is not installed.
    """
    if not asked:
        return [name for name, packages in _TARGETS.items() if not _missing(packages) and _runs(name)]
    for name in asked:
        get_target(name)
        if missing := _missing(_TARGETS.get(name, ())):
            raise MissingExtraError(missing[0], "openvino" if name == "openvino" else "onnx", f"Target {name!r}")
    return list(dict.fromkeys(asked))


def settings_of(target: str, model: nn.Module) -> Iterator[Setting]:
    """What is tried on a target: of OpenVINO float32, bfloat16 where the CPU computes in it, and int8 where nncf, which
    quantises, is installed."""
    if target != "openvino":
        yield Setting(target)
        return
    try:
        default = computes_in(target, model)
    except PruneError:
        yield Setting(target)
        return
    yield Setting(target, {_HINT: "f32"})
    if default.startswith("bf16"):
        yield Setting(target, {_HINT: "bf16"})
    if not _missing(("nncf",)):
        yield Setting(target, int8=True)


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def _runs(target: str) -> bool:
    """Inductor compiles C++ on CPUs."""
    return target != "inductor" or any(map(shutil.which, ("c++", "g++", "clang++")))
