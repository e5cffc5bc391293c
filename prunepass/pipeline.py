"""The passes in order, and the public verb `prune`.

capture -> simplify masks -> resolve lengths -> find blocks -> place -> sizes -> check
        -> for each stage: score -> select -> narrow (or hide)
        -> restore -> cached -> hoist -> cleanup
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from prunepass.errors import OptionError
from prunepass.graph.analysis import Analysis
from prunepass.graph.blocks import Block, find_blocks
from prunepass.graph.capture import Inputs, capture_exported, capture_module, ensure_aten, export_again
from prunepass.graph.head import readings
from prunepass.graph.inputs import TOKENS_TO_TRACE, ModelInputs, fake_value, find_inputs
from prunepass.graph.lengths import resolve_lengths
from prunepass.graph.masks import simplify_masks
from prunepass.graph.reasons import no_raw_errors
from prunepass.graph.sizes import Sizes
from prunepass.graph.wrappers import refuse_pruned, unwrapped
from prunepass.passes.cached import EmptySlots, goes_on_from_cache
from prunepass.passes.cleanup import Cleanup
from prunepass.passes.default_plan import settled
from prunepass.passes.gate import InsertGate
from prunepass.passes.hide import Hide
from prunepass.passes.hoist import HoistReads
from prunepass.passes.narrow import Narrow
from prunepass.passes.place import Check, place
from prunepass.passes.pruned import PrunedModule
from prunepass.passes.restore import Restore
from prunepass.passes.result import PruneResult
from prunepass.passes.score import InsertScore
from prunepass.passes.segments import check_readable
from prunepass.passes.select import InsertLive, InsertSelect
from prunepass.passes.sizes import ReadSizesFromInputs
from prunepass.passes.state import Rewrite
from prunepass.plan import PrunePlan
from prunepass.plan.choice import AnyPlan, Choice, choose
from prunepass.plan.draft import Planned, prunes
from prunepass.scorers import Scorer

if TYPE_CHECKING:
    from prunepass.plan.annotations import Mode

__all__ = ["PruneResult", "PrunedModule", "analyse", "kept_tokens", "prune", "prune_graph", "prune_program"]

logger = logging.getLogger(__name__)

MODES = ("gather", "mask")
Hook = Callable[[str, GraphModule], None]


class _Recorder:
    """The single hook around every pass: counts, times, verifies, dumps."""

    def __init__(self, gm: GraphModule, hook: Hook | None) -> None:
        self.gm = gm
        self.changes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._hook = hook
        self._step = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.gm.graph.lint()
        if self._hook is not None:
            self._hook(f"{self._step:02d}_{name}", self.gm)
        self._step += 1

    def run(self, name: str, work: Callable[[], int]) -> None:
        with self.step(name):
            count = work()
        self.changes[name] = self.changes.get(name, 0) + count
        logger.debug("%s changed %d places", name, count)


def analyse(gm: GraphModule) -> tuple[ModelInputs, Sizes, tuple[Block, ...]]:
    """Inputs, sizes and blocks of an ATen graph. Literals that are lengths become symbolic in it.

    Raises:
        CaptureError, RefusalError: as `find_inputs`, `resolve_lengths` and `find_blocks`.
    """
    found = Analysis.of(gm)
    return found.inputs, found.sizes, found.blocks


def prune_graph(
    gm: GraphModule,
    plan: Planned,
    *,
    mode: str = "gather",
    hook: Hook | None = None,
    copy: bool = True,
    metadata: bool = True,
    scorers: Mapping[int, Scorer] | None = None,
    gates: Mapping[int, nn.Module] | None = None,
    analysis: Analysis | None = None,
    hoist: bool = True,
    fewer_queries: bool = True,
) -> PruneResult:
    """Run the pipeline on a graph.

    Args:
        gm: Dynamo's graph (torch functions) or ATen; with fake tensors on its placeholders.
        plan: of a `Draft` the graph says the rest, see `default_plan.settled`.
        mode: "gather", or "mask" for the differentiable reference.
        hook: called after each pass with its numbered name and the graph; by default `dump.hook`, which writes the
            graphs into the folder named by the environment variable PRUNEPASS_DUMP, if it is set.
        metadata: False leaves out fake tensors on new nodes of a graph with symbolic lengths, see `passes.cleanup`.
        copy: False edits ``gm`` in place where it is ATen already.
        scorers: modules to score with, by stage, in place of those that the plan would make: so that several graphs,
            and an optimiser, share one predictor.
        gates: in mask mode, modules that choose in place of the top scores, by stage, for all stages or none; see
            `prunepass.training.methods.gating`.
        analysis: what was found in ``gm`` before, for one graph under many plans: a copy of it is edited.
        hoist: whether a head's reads of single tokens may move up, see `passes.hoist`; without it the last block's
            end holds all tokens that reach it.
        fewer_queries: whether they may move up through attention, which then has fewer queries than keys: runtimes
            that fuse it with their own cache take as many of one as of the other.

    Raises:
        PlanError, WeightsError: the plan does not fit the model.
        CaptureError: the graph cannot be read.
        RefusalError: it cannot be pruned soundly.
    """
    if mode not in MODES:
        raise OptionError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
    if gates and mode != "mask":
        raise OptionError("Gates choose softly, so they need mode='mask'.")
    if isinstance(plan, PrunePlan) and not prunes(plan):
        _check_scorers(plan)
        return PruneResult(gm, plan, mode)
    from prunepass.passes.dump import hook_from_environment

    reads = HoistReads(fewer_queries) if hoist and mode == "gather" else None
    if analysis is not None:
        return _pruned(analysis.copy(), plan, mode, hook or hook_from_environment(), metadata, scorers, gates, reads)
    refuse_pruned(gm)
    with no_raw_errors():
        given = ensure_aten(gm) if copy else gm
        recorder = _Recorder(given, hook or hook_from_environment())
        with recorder.step("input"):
            inputs = find_inputs(given)
        length = fake_value(inputs.tokens).shape[1]
        if (isinstance(length, int) and length == 1) or goes_on_from_cache(given):
            nothing = plan if isinstance(plan, PrunePlan) else plan.completed(PrunePlan(()))
            return PruneResult(gm, nothing, mode, inputs)  # one token: there is nothing to leave out
        recorder.run("masks", lambda: simplify_masks(given.graph))
        with recorder.step("lengths"):
            sizes, count = resolve_lengths(given, inputs)
        recorder.changes["lengths"] = count
        with recorder.step("blocks"):
            blocks = find_blocks(given, inputs, sizes)
    found = Analysis(given, inputs, sizes, blocks)
    return _pruned(found, plan, mode, recorder, metadata, scorers, gates, reads)


def _pruned(
    found: Analysis,
    plan: Planned,
    mode: str,
    recorder: _Recorder | Hook | None,
    metadata: bool,
    scorers: Mapping[int, Scorer] | None,
    gates: Mapping[int, nn.Module] | None,
    reads: HoistReads | None,
) -> PruneResult:
    """Edit the graph of ``found``."""
    if not isinstance(recorder, _Recorder):
        recorder = _Recorder(found.gm, recorder)
    blocks = found.blocks
    reads_end = readings(found.gm.graph, blocks[-1].end, found.sizes)
    plan = settled(plan, found)
    width = found.sizes.first.values[blocks[0].start].shape[-1]
    sites = place(plan, blocks, width, scorers)
    rewrite = Rewrite(found.gm, plan, mode, found.inputs, found.sizes, blocks, sites)
    rewrite.gates = gates or {}
    check_readable(plan.protect, found.inputs)
    _run(rewrite, recorder, metadata, reads)
    found.gm.meta[TOKENS_TO_TRACE] = plan.tokens_to_trace
    placed = tuple(rewrite.sites)
    seconds, changes = recorder.seconds, recorder.changes
    return PruneResult(found.gm, plan, mode, found.inputs, blocks, placed, rewrite.live, changes, seconds, reads_end)


def _run(rewrite: Rewrite, recorder: _Recorder, metadata: bool, reads: HoistReads | None) -> None:
    recorder.run("sizes", lambda: ReadSizesFromInputs().run(rewrite))
    recorder.run("check", lambda: Check().run(rewrite))
    recorder.run("live", lambda: InsertLive().run(rewrite))
    choose = InsertGate() if rewrite.gates else InsertSelect()
    effect = Narrow() if rewrite.mode == "gather" else Hide()
    for site in rewrite.sites:
        for work in (InsertScore(), choose, effect):
            recorder.run(work.name, partial(work.run, rewrite, site))
    recorder.run("restore", lambda: Restore().run(rewrite))
    if rewrite.cached:
        recorder.run("cached", lambda: EmptySlots().run(rewrite))
    if reads is not None:
        recorder.run("hoist", lambda: reads.run(rewrite))
    recorder.run("cleanup", lambda: Cleanup(metadata).run(rewrite))


def _check_scorers(plan: PrunePlan) -> None:
    from prunepass.scorers import scorer_class

    for index in range(len(plan.stages)):
        scorer_class(plan.scorer_of(index).name)


@overload
def prune(
    model: GraphModule,
    plan: AnyPlan = None,
    example_inputs: Inputs | Tensor | None = None,
    *,
    mode: Mode = "gather",
) -> GraphModule: ...
@overload
def prune(
    model: ExportedProgram,
    plan: AnyPlan = None,
    example_inputs: Inputs | Tensor | None = None,
    *,
    mode: Mode = "gather",
) -> ExportedProgram: ...
@overload
def prune(
    model: nn.Module,
    plan: AnyPlan = None,
    example_inputs: Inputs | Tensor | None = None,
    *,
    mode: Mode = "gather",
) -> nn.Module: ...


def prune(
    model: nn.Module | ExportedProgram | GraphModule,
    plan: AnyPlan = None,
    example_inputs: Inputs | Tensor | None = None,
    *,
    mode: Mode = "gather",
) -> nn.Module | ExportedProgram | GraphModule:
    """Prune a model; what goes in comes out.

    Args:
        model: a module (-> `PrunedModule`; what `torch.compile`, data parallelism or an adapter of PEFT put around it
            is looked through), an exported program (-> exported program), or a graph traced by Dynamo, `make_fx` or
            `torch.export` (-> graph of ATen operators with the same placeholders).
        plan: a `PrunePlan`, a folder or JSON text of one. None takes the plan in the folder that a module was loaded
            from, and where there is none, the default one, which "default" always does.
        example_inputs: for a module: the keyword arguments (a mapping) or positional ones (a sequence) to trace it
            with. Batch and length stay open.
        mode: "gather" removes tokens; "mask" hides them, with the same values at the tokens kept: the reference, and
            the differentiable form used in training.

    Returns:
        The pruned model. With every keep at 1 it is the given one, untouched.

    Raises:
        PlanError: the plan is wrong, or names a block that the model does not have.
        WeightsError: its weights are damaged, or made for another width.
        CaptureError: the model cannot be traced, or its inputs cannot be told apart.
        RefusalError: it cannot be pruned soundly there; the message names the place.
        OptionError: ``model`` is no model, or ``example_inputs`` are none of its own.
    """
    inside = unwrapped(model)
    choice = choose(plan, inside)
    if isinstance(model, ExportedProgram):
        return prune_program(model, choice, mode)[0]
    if isinstance(model, GraphModule):
        return prune_graph(model, choice.plan, mode=mode).graph_module
    if not prunes(choice.plan):
        return model
    if example_inputs is None:
        raise OptionError(
            "prune(model, plan, example_inputs): a module is traced with example inputs. Give the keyword arguments of "
            "a real call, for instance dict(tokenizer(['some text', 'more'], padding=True, return_tensors='pt'))."
        )
    captured = capture_module(inside, example_inputs)
    with choice.blamed():
        result = prune_graph(captured.graph_module, choice.plan, mode=mode, copy=False, metadata=False)
    logger.info("pruned by %s", choice.source)
    return PrunedModule(captured, result, inside)


def prune_program(program: ExportedProgram, choice: Choice, mode: str = "gather") -> tuple[ExportedProgram, PrunePlan]:
    """An exported program pruned, and the plan that is in it. Raises as `prune_graph`."""
    if isinstance(choice.plan, PrunePlan) and not prunes(choice.plan):
        return program, choice.plan
    captured = capture_exported(program)
    result = prune_graph(captured.graph_module, choice.plan, mode=mode, copy=False, metadata=False)
    return export_again(result.graph_module, program, result.plan.tokens_to_trace), result.plan


def kept_tokens(model: nn.Module, plan: AnyPlan, example_inputs: Any) -> list[Tensor]:
    """Which tokens each stage keeps on given inputs.

    Returns:
        One [B, S] bool tensor a stage that prunes, in order.
    """
    choice = choose(plan, model)
    captured = capture_module(model, example_inputs)
    result = prune_graph(captured.graph_module, choice.plan, mode="mask", copy=False, metadata=False)
    if not result.sites:
        return []
    graph = result.graph_module.graph
    by_name = {n.name: n for n in graph.nodes}
    output: Node = next(iter(graph.find_nodes(op="output")))
    output.args = (tuple(by_name[name] for name in result.kept),)
    graph._codegen = torch.fx.graph.CodeGen()
    graph.eliminate_dead_code()
    result.graph_module.recompile()
    values = example_inputs
    if not isinstance(example_inputs, Mapping):
        given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        values = dict(zip(captured.inputs, given, strict=True))
    interpreter = torch.fx.Interpreter(result.graph_module)
    with torch.no_grad():
        return list(interpreter.run(*(values[name] for name in captured.inputs), enable_io_processing=False))
