"""What plans do to several residual streams of one graph: a report on each, and the FLOPs of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from prunepass.cost.flops import flops_of_run
from prunepass.errors import OptionError
from prunepass.graph.capture import Captured, Inputs, ensure_aten, export_again
from prunepass.graph.inputs import TOKENS_TO_TRACE
from prunepass.graph.streams import check_separate
from prunepass.passes.streams import one_after_another
from prunepass.pipeline import PruneResult, prune_graph
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice
from prunepass.report.data import Fusions, PartFlops, WholeFlops
from prunepass.report.report import Report
from prunepass.report.traced import Asked, fusions_of, report_on

__all__ = ["report_on_streams"]


def report_on_streams(
    model: nn.Module, choices: Sequence[Choice], captured: Captured, example_inputs: Inputs, asked: Asked
) -> Report:
    """The report on a model with several streams in one graph.

    Args:
        choices: a plan for each stream, which it names.
        captured: the model, traced.

    Raises:
        OptionError: lengths or a text, which are of one stream; or as `report_on`.
        PlanError, RefusalError: as `check_separate`.
    """
    for name in ("lengths", "max_length", "text"):
        if getattr(asked, name) is not None:
            raise OptionError(
                f"explain({name}=...) is of rows of one stream, and the plans are for several, whose FLOPs and tokens "
                f"are counted on the example as it is. Leave {name} out, or give one plan."
            )
    check_separate(captured.graph_module, [str(choice.plan.stream) for choice in choices])
    each = replace(asked, target=None)
    reports = [report_on(model, choice, captured, example_inputs, each)[0] for choice in choices]
    parts = tuple(replace(report, part=str(report.plan.stream), flops=None) for report in reports)
    whole = Report(type(model).__name__, PrunePlan(()), parts[0].batch, parts[0].length, parts=parts)
    refusals = tuple(replace(refusal, where=part.part) for part in parts for refusal in part.refusals)
    if refusals:
        return replace(whole, refusals=refusals)
    result = one_after_another(ensure_aten(captured.graph_module), choices, partial(prune_graph, copy=False))
    values = _values(captured, example_inputs)
    dense, pruned = (flops_of_run(gm, values).flops for gm in (captured.graph_module, result.graph_module))
    return replace(
        whole,
        whole=_whole(parts, sum(dense.values()), sum(pruned.values())),
        fusions=_fusions(asked.target, model, captured, result),
    )


def _values(captured: Captured, inputs: Inputs) -> list[Any]:
    return [inputs[name] for name in captured.inputs] if isinstance(inputs, Mapping) else list(inputs)


def _whole(parts: Sequence[Report], dense: int, pruned: int) -> WholeFlops:
    rows = [
        PartFlops(f"blocks of {p.part}", sum(b.dense_flops for b in p.blocks), sum(b.pruned_flops for b in p.blocks))
        for p in parts
    ]
    rest = PartFlops(
        "all else, scoring included", dense - sum(r.dense for r in rows), pruned - sum(r.pruned for r in rows)
    )
    return WholeFlops.of([*rows, rest])


def _fusions(target: str | None, model: nn.Module, captured: Captured, result: PruneResult) -> Fusions | None:
    if target is None:
        return None
    pruned = export_again(result.graph_module, captured.exported, result.graph_module.meta[TOKENS_TO_TRACE])
    return fusions_of(target, model, captured.exported, pruned)
