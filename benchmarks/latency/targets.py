"""Runtimes and precisions by name, and how a model gets there."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import prunepass
from prunepass import PrunePlan
from prunepass.errors import OptionError

#: graphs that Dynamo may make of one function: several models, plans and lengths share a model's ``forward``
_GRAPHS = 256
Run = Callable[..., Any]


@dataclass(frozen=True)
class How:
    """What all targets are told alike.

    Attributes:
        dynamic: one callable takes every length; else it need only take those of its example.
        threads: for the runtime to compute with.
    """

    dynamic: bool
    threads: int


class Maker(Protocol):
    """Brings a model to a runtime. A plan without stages makes the dense model, by the same way."""

    def __call__(self, model: nn.Module, plan: PrunePlan, example: Mapping[str, Tensor], how: How) -> Run:
        """A callable with the model's own keyword arguments.

        Args:
            example: ``input_ids`` and ``attention_mask``, int64 [batch, length].
        """
        ...


@dataclass(frozen=True)
class Target:
    """A runtime at one precision.

    Attributes:
        make: brings a model there.
        dtype: the model is cast to it first.
        packages: those it needs.
    """

    runtime: str
    precision: str
    make: Maker
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    packages: tuple[str, ...] = field(default=())

    def why_not(self) -> str | None:
        """Why it cannot be measured here; None where it can."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"it needs the package {missing[0]}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "it needs a CUDA device, and torch sees none"
        return None

    def check(self) -> None:
        """Raises `OptionError` where it cannot be measured here."""
        if reason := self.why_not():
            raise OptionError(f"Target {self.runtime}-{self.precision} cannot be measured: {reason}.")


def compiled(runtime: str, config: Callable[[How], Mapping[str, Any]] = lambda how: {}) -> Maker:
    """A maker by way of ``torch.compile(backend="tokprune")``.

    Args:
        config: the runtime's settings.
    """

    def make(model: nn.Module, plan: PrunePlan, example: Mapping[str, Tensor], how: How) -> Run:
        options: dict[str, Any] = {"plan": plan, "target": runtime, "config": dict(config(how))}
        run: Run = torch.compile(model, backend="tokprune", dynamic=how.dynamic, options=options)
        return run

    return make


def _openvino(precision: str) -> Maker:
    return compiled(
        "openvino", lambda how: {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": how.threads}
    )


def _int8(to: str, load: Callable[[Path, How], Run]) -> Maker:
    """A maker by way of an int8 export. Ranges are measured on the example alone: they change no time.

    Args:
        to: the export's format.
        load: a callable of the model's keyword arguments, from the folder written.
    """

    def make(model: nn.Module, plan: PrunePlan, example: Mapping[str, Tensor], how: How) -> Run:
        rows, length = example["input_ids"].shape
        fixed = {} if how.dynamic else {"batch": rows, "length": length}
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "model"
            prunepass.export(model, plan, home, to=to, example_inputs=dict(example), int8=[example], **fixed)
            return load(home, how)

    return make


def _openvino_int8(home: Path, how: How) -> Run:
    from prunepass.backends._openvino_core import core

    model = core().read_model((home / "openvino_model.xml").read_bytes(), (home / "openvino_model.bin").read_bytes())
    run = core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": how.threads})
    return lambda **inputs: run({name: value.numpy() for name, value in inputs.items()})


def _onnx_int8(home: Path, how: How) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = how.threads
    session = onnxruntime.InferenceSession(home / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})


_OPENVINO, _ONNX = ("openvino",), ("onnx", "onnxscript", "onnxruntime")
_INDUCTOR = compiled("inductor")  # and eager: both compute with torch's own threads

TARGETS: dict[str, Target] = {
    "openvino-f32": Target("openvino", "f32", _openvino("f32"), packages=_OPENVINO),
    "openvino-bf16": Target("openvino", "bf16", _openvino("bf16"), packages=_OPENVINO),
    "openvino-int8": Target("openvino", "int8", _int8("openvino", _openvino_int8), packages=(*_OPENVINO, "nncf")),
    "onnxruntime-f32": Target(
        "onnxruntime", "f32", compiled("onnxruntime", lambda how: {"intra_op_num_threads": how.threads}), packages=_ONNX
    ),
    "onnxruntime-int8": Target("onnxruntime", "int8", _int8("onnx", _onnx_int8), packages=_ONNX),
    "inductor-f32": Target("inductor", "f32", _INDUCTOR),
    "inductor-bf16": Target("inductor", "bf16", _INDUCTOR, dtype=torch.bfloat16),
    "inductor-cuda-bf16": Target("inductor", "bf16", _INDUCTOR, device="cuda", dtype=torch.bfloat16),
    "inductor-cuda-f16": Target("inductor", "f16", _INDUCTOR, device="cuda", dtype=torch.float16),
    "eager-f32": Target("eager", "f32", compiled("eager")),
}


def compile_for(target: Target, model: nn.Module, plan: PrunePlan, example: Mapping[str, Tensor], how: How) -> Run:
    """The model on the target; a call returns once its work is done, on whatever device."""
    run = target.make(model, plan, example, how)
    if target.device == "cpu":
        return run

    def waited(**arguments: Tensor) -> Any:
        found = run(**arguments)
        torch.accelerator.synchronize()
        return found

    return waited


@contextmanager
def runtime_state(threads: int) -> Iterator[None]:
    """Torch without gradients, with so many threads, and with room for many graphs; nothing compiled is left behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        limits = {"recompile_limit": _GRAPHS, "accumulated_recompile_limit": 4 * _GRAPHS}
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            yield
    finally:
        torch.set_num_threads(before)
        torch._dynamo.reset()
        gc.collect()


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in TARGETS:
        raise OptionError(f"There is no target {name!r}; there are {', '.join(TARGETS)}.")
    return TARGETS[name]
