"""What plans do to a vision-language model with images: a report on each part that has one, and the FLOPs of all of it.

How many tokens leave the language model depends on which of a prompt are an image's, so that it runs on real numbers
here: once as it is, once pruned, and once in mask mode as far as the last stage.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.cost.eager import EagerFlops
from prunepass.cost.flops import Counts, flops_of_run
from prunepass.errors import OptionError, PlanError, RefusalError
from prunepass.graph.capture import Captured, capture_module, export_again
from prunepass.graph.inputs import TOKENS_TO_TRACE
from prunepass.graph.language_part import CallReader, capture_part
from prunepass.graph.prompts import take_prompt
from prunepass.graph.towers import call_inside, part_blamed, reading_with
from prunepass.graph.vision import decoder_of_parts
from prunepass.passes.pruned import PrunedModule
from prunepass.passes.pruned_vision import PrunedTower
from prunepass.pipeline import PruneResult, analyse, prune_graph
from prunepass.plan import PrunePlan
from prunepass.plan.by_stream import StreamPlans
from prunepass.plan.choice import Choice
from prunepass.plan.images import image_plan
from prunepass.report.data import Fusions, PartFlops, WholeFlops
from prunepass.report.report import Report
from prunepass.report.tokens import TokenCounts, live_tokens
from prunepass.report.traced import (
    Asked,
    alive_tokens,
    block_rows,
    fusions_of,
    head_warnings,
    pass_rows,
    refused,
    report_on,
    sentence_of,
    stage_rows,
)

__all__ = ["report_on_parts"]


def report_on_parts(model: nn.Module, plans: StreamPlans, example: Any, asked: Asked) -> Report:
    """The report on a vision-language model.

    Args:
        plans: of its parts.
        example: keyword arguments, with images.

    Raises:
        OptionError: there are no images; something is asked for that is not known of prompts with images; or as
            `report_on`.
        PlanError, RefusalError, CaptureError: as `explain`.
    """
    decoder = decoder_of_parts(model, example)
    for name in ("lengths", "max_length", "text"):
        if getattr(asked, name) is not None:
            raise OptionError(
                f"explain({name}=...) is of rows of text, and this example has images, on which FLOPs and tokens are "
                f"counted as they are. Leave {name} out."
            )
    choice = plans.language or Choice(PrunePlan(()), "no plan")
    with choice.blamed():
        plan = PrunePlan(()) if plans.language is None else image_plan(choice.plan, model)
    captured, _, reader = capture_part(model, decoder, example)
    take_prompt(captured.graph_module)
    towers = {path: _Tower.of(model, reader, path, given, example, asked) for path, given in plans.towers.items()}
    dense = {path: tower.module.forward for path, tower in towers.items()}
    _, spent = _read(reader, dense, example)
    call, left = _read(reader, {path: tower.pruned or dense[path] for path, tower in towers.items()}, example)
    path = next(name for name, module in model.named_modules() if module is decoder)
    language = _Language(model, path, replace(choice, plan=plan), captured, call)
    report, flops = language.report(asked)
    parts = [tower.report for tower in towers.values()] + ([report] if plans.language is not None else [])
    rows, length = call["input_ids"].shape
    refusals = tuple(replace(r, where=_joined(p.part, r.where)) for p in parts for r in p.refusals)
    whole = None if flops is None or refusals else _whole(towers, path, spent, left, flops)
    return Report(type(model).__name__, PrunePlan(()), rows, length, refusals=refusals, parts=tuple(parts), whole=whole)


def _joined(part: str, where: str | None) -> str:
    return part if where in (None, part) else f"{part}: {where}"


def _whole(
    towers: Mapping[str, _Tower], language: str, dense: Counter[str], pruned: Counter[str], flops: PartFlops
) -> WholeFlops:
    """The sum over the towers, what else reads images, and the language model.

    Args:
        dense, pruned: FLOPs of reading the images, see `_read`.
    """
    parts = [PartFlops(path, dense[path], pruned[path]) for path in towers]
    return WholeFlops.of([*parts, PartFlops(f"all before {language}", dense[""], pruned[""]), flops])


def _read(
    reader: CallReader, towers: Mapping[str, Callable[..., Any]], example: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Counter[str]]:
    """The call of the language model, and the FLOPs of what runs before it: by tower, and under "" all else."""
    counter = EagerFlops()
    counted = {path: counter.counted_as(path, run) for path, run in towers.items()}
    with torch.no_grad(), counter:
        call = (reading_with(reader, counted) if counted else reader).read(**example)
    return call, counter.flops


@dataclass(frozen=True)
class _Tower:
    """A tower, the report on it, and what stands in for it; None where its plan was refused."""

    module: nn.Module
    report: Report
    pruned: PrunedTower | None

    @classmethod
    def of(
        cls, model: nn.Module, reader: CallReader, path: str, choice: Choice, example: Mapping[str, Any], asked: Asked
    ) -> _Tower:
        call, module = call_inside(reader, path, example), model.get_submodule(path)
        with part_blamed(path):
            captured = capture_module(module, call)
            report, result = report_on(module, choice, captured, call, replace(asked, target=None, tokenizer=None))
        report = _placed(replace(report, part=path), module, f"{path}.")
        if result is None:
            return cls(module, report, None)
        report = replace(report, fusions=_fusions(asked.target, module, captured, result))
        made = PrunedModule(captured, result, module)
        return cls(module, report, PrunedTower(path, made, inspect.signature(module.forward), call))


@dataclass(frozen=True)
class _Language:
    """The language model and its head, traced.

    Attributes:
        path: of the language model in ``model``.
        choice: its plan, which names the tokens that may leave.
        call: what it is called with, the features of images among it, by name.
    """

    model: nn.Module
    path: str
    choice: Choice
    captured: Captured
    call: dict[str, Tensor]

    def report(self, asked: Asked) -> tuple[Report, PartFlops | None]:
        """The report on it, and its FLOPs on the call; None where the plan was refused."""
        plan, gm = self.choice.plan, self.captured.graph_module
        assert isinstance(plan, PrunePlan)
        ids, kind = self.call["input_ids"], type(self.model.get_submodule(self.path)).__name__
        rows, length = ids.shape
        report = Report(kind, plan, rows, length, plan_source=self.choice.source, part=self.path)
        try:
            with self.choice.blamed():
                result = prune_graph(gm, plan, metadata=False)
        except (RefusalError, PlanError) as error:
            return refused(
                report, self.captured, TokenCounts(length, plan.protect), lambda: self._run(gm).flops, error
            ), None
        dense, pruned = self._run(gm), self._run(result.graph_module)
        flops = PartFlops(f"{self.path} and the head", sum(dense.flops.values()), sum(pruned.flops.values()))
        counts = TokenCounts.of_prompt(plan.protect, ids, live_tokens(self.call, (rows, length)))
        blocks = result.blocks or analyse(gm)[2]
        alive = [kept[:1] for kept in alive_tokens(self.captured, plan, self.call)]
        row = {"input_ids": ids[:1], "attention_mask": self.call["attention_mask"][:1]}
        report = replace(
            report,
            streams=_in_words(counts),
            blocks=block_rows(gm, blocks, plan, counts, dense.flops, pruned.flops),
            stages=stage_rows(result, counts),
            passes=pass_rows(result),
            fusions=_fusions(asked.target, self.model, self.captured, result),
            warnings=tuple(head_warnings(result)),
            sentence=sentence_of(plan, row, alive, asked.tokenizer, len(blocks), None),
        )
        return _placed(report, self.model), flops

    def _run(self, gm: torch.fx.GraphModule) -> Counts:
        return flops_of_run(gm, [self.call[name] for name in self.captured.inputs])


def _fusions(target: str | None, model: nn.Module, captured: Captured, result: PruneResult) -> Fusions | None:
    """Of programs with tensors alone for inputs, as `prunepass.export` writes them: a tower is called with options."""
    if target is None:
        return None
    from prunepass.backends._plain import plain

    tokens = result.graph_module.meta.get(TOKENS_TO_TRACE, result.plan.tokens_to_trace)
    both = (export_again(gm, captured.exported, tokens) for gm in (captured.graph_module, result.graph_module))
    return fusions_of(target, model, *(plain(program, length=None, batch=None, limit=None)[1] for program in both))


def _placed(report: Report, module: nn.Module, prefix: str = "") -> Report:
    """The report with paths in the whole model, in place of those in what was traced: a module around ``module``.

    Args:
        prefix: path of ``module`` in the whole model, with its dot.
    """
    known = {name for name, _ in module.named_modules()}

    def place(path: str) -> str:
        while path not in known and "." in path:
            path = path.partition(".")[2]
        return f"{prefix}{path}" if path in known and path else ""

    def placed(line: str) -> str:  # "encoder (from pixel_values): ..."
        path, source, rest = line.partition(" (from ")
        return f"{place(path)}{source}{rest}" if source else line

    return replace(
        report,
        streams=tuple(map(placed, report.streams)),
        blocks=tuple(replace(row, path=place(row.path)) for row in report.blocks),
        stages=tuple(replace(row, path=place(row.path)) for row in report.stages),
    )


def _in_words(counts: TokenCounts) -> tuple[str, ...]:
    """Which tokens are counted in I, see `TokenCounts.formula`."""
    if not counts.leaving:
        return ()
    each = ", ".join(map(str, counts.leaving))
    return (f"only I tokens of a row may leave, those of its images: {each} in the rows of the example",)
