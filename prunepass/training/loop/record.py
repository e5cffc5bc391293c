"""What a run leaves on record: all that is needed to do the same again."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prunepass.training.data.options import SearchOptions, TrainOptions
from prunepass.training.loop.evaluate import METHOD
from prunepass.training.loop.prepare import ReadyToSearch, ReadyToTrain
from prunepass.training.loop.processes import world_size

__all__ = ["details", "versions"]


def details(options: TrainOptions | SearchOptions, ready: ReadyToTrain | ReadyToSearch) -> dict[str, Any]:
    """All that is needed to do the same again."""
    if isinstance(ready, ReadyToTrain):
        command = "train"
        named = {"train": (ready.sources[0], ready.train), "eval": (ready.sources[1], ready.evaluation)}
        if ready.validation is not None:
            named["validation"] = (ready.sources[2], ready.validation)
    else:
        command, named = "search", {"calibration": (ready.source, ready.calibration)}
    data = {
        use: {
            "name": examples.name,
            "examples": len(examples),
            "rows": len(features),
            "cut": features.cut,
            "max_length": features.max_length,
            "columns": dict(examples.columns),
        }
        for use, (examples, features) in named.items()
    }
    plain = {"goal": vars(options.goal) | {}, "seed": options.seed}
    return plain | {
        "command": command,
        "options": _plain(asdict(options)),
        "data": data,
        "processes": world_size(),
        "interval_method": METHOD,
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    """Of what took part."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("prunepass", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "datasets")
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in (*names, "openvino", "onnxruntime"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
