"""The ways through the product, each as a function of a call's inputs, and the reference that it must agree with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
import oracle
import prunepass
import zoo
from fuzz.cases import Episode
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import PruneResult

__all__ = ["Run", "captured", "model_of", "pruned", "way_of"]

#: inputs to outputs by name
Run = Callable[[Mapping[str, Tensor]], Any]


def model_of(episode: Episode) -> nn.Module:
    """The episode's tiny model."""
    return zoo.tiny(episode.name, episode.head, dtype=episode.dtype)


def captured(episode: Episode) -> Captured:
    """Its graph; in float64 shared by all episodes of a group."""
    if episode.dtype == torch.float64:
        return harness.captured(episode.name, episode.head, episode.inputs)
    return capture_module(model_of(episode), harness.example(episode.inputs))


def pruned(episode: Episode, source: Captured, mode: str) -> PruneResult:
    """Its plan on that graph."""
    return harness.pruned(source, episode.plan, mode)


def way_of(episode: Episode) -> Run:
    """What the episode's way gives, ready to be called."""
    kind, _, format = episode.way.partition(" ")
    if kind == "export":
        return _export(episode, format)
    if kind == "program":
        source = captured(episode)
        program = prunepass.prune(source.exported, episode.plan)
        return lambda inputs: harness.run(program.module(), inputs)
    return _compiled(episode)


def _compiled(episode: Episode) -> Run:
    torch._dynamo.reset()
    config = {"INFERENCE_PRECISION_HINT": "f32"} if episode.way == "openvino" else {}
    options = {"plan": episode.plan, "target": episode.way, "config": config}
    fast = torch.compile(model_of(episode), backend="tokprune", options=options)
    return lambda inputs: harness.run(fast, inputs)


def _export(episode: Episode, to: str) -> Run:
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "out"
    options: dict[str, Any] = {"stateful": False} if to == "openvino" else {}
    prunepass.export(
        model_of(episode), episode.plan, out, to=to, example_inputs=harness.example(episode.inputs), **options
    )
    run = {"openvino": _openvino, "onnx": _onnx, "pt2": _pt2}[to](out)

    def call(inputs: Mapping[str, Tensor], keep: Any = folder) -> Any:  # the folder lives as long as the function
        return run(inputs)

    return call


def _openvino(out: Path) -> Run:
    import openvino as ov

    compiled = ov.Core().compile_model(out / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({k: v.numpy() for k, v in inputs.items()})
        return {port.get_any_name(): torch.from_numpy(found[port].copy()) for port in compiled.outputs}

    return run


def _onnx(out: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        return {n: torch.from_numpy(a) for n, a in zip(names, session.run(None, given), strict=True)}

    return run


def _pt2(out: Path) -> Run:
    program = torch.export.load(out / "model.pt2").module()
    return lambda inputs: harness.run(program, inputs)


def generated(episode: Episode) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Five tokens after each prompt by greedy search, with the prompt pruned: [B, 5] int64."""
    torch._dynamo.reset()
    with oracle.float64_softmax():
        model: Any = zoo.tiny(episode.name, "causal", dtype=episode.dtype, use_cache=True, eos_token_id=None)
    model.compile(backend="tokprune", options={"plan": episode.plan, "target": "eager"})

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad(), oracle.float64_softmax():
            out: Tensor = model.generate(**given, max_new_tokens=5, do_sample=False)
        return out[:, given["input_ids"].shape[1] :]

    return run
