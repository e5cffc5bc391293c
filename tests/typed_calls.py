"""Calls as users write them. Not run: type checkers read it (see test_typing.py)."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

import prunepass
from prunepass import Protect, PrunePlan, ScorerSpec, Stage


def plans() -> list[PrunePlan]:
    stages = [
        Stage(layer=2, keep=0.5),
        Stage(4, "1/4", "norm"),
        Stage(5, Fraction(1, 8), {"name": "random", "seed": 7}),
    ]
    stages.append(Stage(6, Decimal("0.1"), ScorerSpec("norm"), after_attention=True))
    protect = Protect(first=1, last=0, token_ids=[102], last_share=0.1)
    assert_type(stages[0].keep, Fraction)
    assert_type(stages[0].layer, int)
    assert_type(protect.token_ids, tuple[int, ...])
    made = PrunePlan(stages=stages, scorer="attention", protect=protect, restore="zeros")
    assert_type(made.stages, tuple[Stage, ...])
    assert_type(made.scorer, ScorerSpec)
    return [
        made,
        PrunePlan(tuple(stages), {"name": "random", "seed": 1}),
        PrunePlan([Stage(1, 1)], weights={"stages.0.fc1.weight": torch.zeros(2, 2)}),
        PrunePlan.short(0.5, [2, 4]),
        PrunePlan.short([0.5, "1/4"], (2, 4), "norm", {"first": 2}, restore="lens"),
        PrunePlan.short("1/2", range(2, 4), protect=Protect(2)),
        PrunePlan.sdtp(12, ratio="9/10", local=0.1),
        PrunePlan.default(12),
        PrunePlan.from_pretrained("folder"),
        PrunePlan.from_pretrained(Path("folder")),
        PrunePlan.from_json("{}"),
        PrunePlan.from_dict({"stages": []}),
    ]


def pruning(
    module: nn.Module,
    program: ExportedProgram,
    graph: GraphModule,
    inputs: dict[str, Tensor],
    plan: PrunePlan,
    options: Mapping[str, Any],
) -> None:
    assert_type(prunepass.prune(module, plan, inputs), nn.Module)
    assert_type(prunepass.prune(program, plan), ExportedProgram)
    assert_type(prunepass.prune(graph, plan), GraphModule)
    prunepass.prune(module, "folder", (torch.zeros(1, 2),), mode="mask")
    prunepass.prune(module, Path("folder"), [torch.zeros(1, 2)], mode="gather")
    prunepass.prune(module, {"keep": 0.5, "layers": [2]}, inputs)
    prunepass.prune(module, options, torch.zeros(1, 2))
    prunepass.prune(module, None, inputs)
    prunepass.prune(module, example_inputs=inputs)
    report = prunepass.explain(module, plan, inputs, target="openvino", lengths=[3, 4])
    prunepass.explain(module, None, torch.zeros(1, 2))
    assert_type(report, prunepass.Report)
    assert_type(report.to_html("report.html"), Path)
    report.to_html(Path("report.html"))


def exporting(module: nn.Module, program: ExportedProgram, plan: PrunePlan, batches: list[dict[str, Tensor]]) -> None:
    assert_type(prunepass.export(module, plan, "out/", to="openvino"), Path)
    prunepass.export(module, None, Path("out"), "onnx", int8=True)
    prunepass.export(module, "folder", "out", to="pt2", length=16, batch=2)
    prunepass.export(program, plan, "out", int8=batches)
    prunepass.export(module, plan, "out", example_inputs=[torch.zeros(1, 2)])


def saving(plan: PrunePlan) -> None:
    plan.save_pretrained("folder")
    plan.save_pretrained(Path("folder"))


def mistakes(module: nn.Module, plan: PrunePlan) -> None:
    """Each is one that a type checker sees; without the error the comment is unused, and that is an error, too."""
    Stage("2", 0.5)  # type: ignore[arg-type]
    Stage(2, None)  # type: ignore[arg-type]
    PrunePlan([Stage(2, 0.5)], restore="zero")  # type: ignore[arg-type]
    prunepass.prune(module, plan, mode="masked")  # type: ignore[call-overload]
    prunepass.export(module, plan, "out", to="tflite")  # type: ignore[arg-type]
