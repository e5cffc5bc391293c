"""The three graphs that training runs, all made from one trace of the user's model and sharing its parameters.

* *watched*: the dense model, with hidden states and attention received at its cuts to look at;
* *gated*: mask mode with a trained gate at each stage: what ToP's search and SDTP's selection differentiate through;
* *pruned*: gather mode, the deployed form, as cheap to train as it is to run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from prunepass.errors import PlanError
from prunepass.graph.analysis import Analysis
from prunepass.graph.blocks import Block
from prunepass.graph.capture import Captured, capture_module, ensure_aten
from prunepass.graph.head import Reading, readings
from prunepass.graph.ops import SDPA
from prunepass.passes.cleanup import Cleanup
from prunepass.passes.live import InsertLive
from prunepass.passes.runner import Runner
from prunepass.passes.score import InsertScore
from prunepass.passes.sizes import ReadSizesFromInputs
from prunepass.passes.state import Rewrite, Site
from prunepass.pipeline import PrunedModule, PruneResult, prune_graph
from prunepass.plan import Protect, PrunePlan, Stage
from prunepass.scorers import Scorer, scorer_class
from prunepass.training.methods.gating import Gate

__all__ = ["Gated", "Pruned", "Stream", "Tap", "TrainingGraphs", "Watched", "let_go"]


class Tap(nn.Module):
    """Hands a value on and keeps it.

    Attributes:
        value: of the last run.
        leaf: whether the value is cut from what came before and given a gradient of its own: gradients at the cuts of
            a frozen model, without those of its parameters.
    """

    _is_impure = True  # kept by fx although nothing may read it

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self.leaf = False

    def forward(self, value: Tensor) -> Tensor:
        """The value itself."""
        if self.leaf:
            value = value.detach().requires_grad_()
        self.value = value
        return value

    def take(self) -> Tensor:
        """The value of the last run, which is let go."""
        assert self.value is not None, "the graph has not run"
        value, self.value = self.value, None
        return value


def let_go(module: nn.Module) -> None:
    """Forget what the taps of a graph hold of its last run."""
    for tap in module.modules():
        if isinstance(tap, Tap):
            tap.value = None


@dataclass
class Watched:
    """The dense model with taps.

    Attributes:
        module: takes the model's inputs and returns its outputs.
        hidden: by block, the residual stream before it, [B, S, D]; that after the last block by the number of blocks.
        attention: by block, the attention received in it, averaged over heads and live query rows, [B, S] float32.
    """

    module: nn.Module
    hidden: dict[int, Tap]
    attention: dict[int, Tap]


@dataclass
class Gated:
    """Mask mode with gates; ``gates[i]`` belongs to stage i of the plan."""

    module: nn.Module
    gates: Sequence[Gate]


@dataclass
class Stream:
    """The residual stream of a pruned model before block ``block`` (after the last one, the number of blocks).

    Attributes:
        state: [B, K, D].
        positions: [B, K] int64, where its slots stand in the original row.
        alive: [B, K] bool, False at surplus slots; None where every slot is alive.
    """

    block: int
    state: Tap
    positions: Tap
    alive: Tap | None


@dataclass
class Pruned:
    """Gather mode with the scores of each stage to look at.

    Attributes:
        module: the pruned model.
        scores: by stage, [B, T] scores of the tokens that reached it.
        positions: by stage, [B, T] int64, where these stand in the original row; None at the first stage.
        alive: by stage, [B, T] bool, False at surplus slots; None where every slot is alive.
        hidden: the residual stream where it has been pruned, as in `Watched`, each with where its slots stand.
    """

    module: PrunedModule
    scores: Sequence[Tap]
    positions: Sequence[Tap | None]
    alive: Sequence[Tap | None]
    hidden: Sequence[Stream]


class TrainingGraphs:
    """One model, traced once; its graphs are made when asked for.

    Args:
        model: any Hugging Face encoder, or a decoder without cache. Nothing in it is changed; all graphs use its own
            parameters and buffers, so it must not be moved to another device afterwards.
        example_inputs: keyword arguments to trace it with, at least the inputs it is going to be trained on.

    Raises:
        CaptureError, RefusalError: the model cannot be traced, or not be pruned.
    """

    def __init__(self, model: nn.Module, example_inputs: Mapping[str, Any]) -> None:
        was_training = model.training
        model.eval()  # dropout is left out of the trace: gates and losses want the deployed values
        try:
            self._captured: Captured = capture_module(model, example_inputs)
        finally:
            model.train(was_training)
        self._model = model
        self._found = Analysis.of(ensure_aten(self._captured.graph_module))
        self.blocks = self._found.blocks
        self.names: tuple[str, ...] = self._captured.inputs

    @property
    def graph(self) -> GraphModule:
        """The dense graph, for counting its cost. Not to be edited."""
        return self._found.gm

    @property
    def captured(self) -> Captured:
        """The trace."""
        return self._captured

    @property
    def prefix(self) -> int:
        """How many class and register tokens stand before an image's patches; 0 for texts."""
        return self._found.inputs.prefix

    def protecting(self, protect: Protect, *, reads_one: bool) -> Protect:
        """``protect``, with what the model's head reads: class and register tokens, and the last token where one answer
        is read at another than the first. Causal classifiers read it there, and a pruned token's state is an early one.

        Args:
            reads_one: whether the head may read its answer at a single token.
        """
        first, last = max(protect.first, self.prefix), protect.last
        if reads_one and not last:
            reads = readings(self._found.gm.graph, self.blocks[-1].end, self._found.sizes)
            last = int(reads != {Reading.FIRST})
        return replace(protect, first=first, last=last)

    @property
    def width(self) -> int:
        """Of the hidden state at the cuts."""
        return int(self._found.sizes.first.values[self.blocks[0].start].shape[-1])

    def pruned(self, plan: PrunePlan, scorers: Mapping[int, Scorer] | None = None) -> PrunedModule:
        """Gather mode under ``plan``; ``scorers`` are shared predictors by stage (see `pipeline.prune_graph`)."""
        result = self._rewritten(plan, scorers)
        if result.sites:  # else it is the traced graph itself
            attend_in_float32(result.graph_module)
        return PrunedModule(self._captured, result, self._model)

    def pruned_and_watched(self, plan: PrunePlan, scorers: Mapping[int, Scorer] | None = None) -> Pruned:
        """`pruned`, with taps on what its stages ranked."""
        module = self.pruned(plan, scorers)
        gm, sites, live = module.graph_module, module.result.sites, module.result.live
        scores, positions, alive = [], [], []
        for i, site in enumerate(sites):
            before = sites[i - 1].kept if i else None
            assert site.scores is not None
            scores.append(_tap(gm, site.scores, f"prunepass_scores_{i}"))
            positions.append(_tap_beside(gm, before.positions if before else None, f"prunepass_positions_{i}"))
            ranked = before.alive if before else live.alive if live else None
            alive.append(_tap_beside(gm, ranked, f"prunepass_alive_{i}"))
        streams = self._streams(module) if sites else []
        gm.recompile()
        return Pruned(module, scores, positions, alive, streams)

    def _streams(self, module: PrunedModule) -> list[Stream]:
        gm, sites, blocks = module.graph_module, module.result.sites, module.result.blocks
        ends = {block.index + 1: block.end for block in blocks}
        streams, there = [], set(gm.graph.nodes)
        for i, site in enumerate(sites):
            assert site.kept is not None
            assert site.kept.positions is not None
            if site.kept.positions not in there:
                continue  # merged tokens of the last stage are looked up by their hosts, and nothing read its places
            until = sites[i + 1].stage.layer if i + 1 < len(sites) else len(blocks)
            positions = _tap(gm, site.kept.positions, f"prunepass_kept_{i}")
            alive = _tap_beside(gm, site.kept.alive, f"prunepass_kept_alive_{i}")
            for block in range(site.stage.layer + 1, until + 1):
                streams.append(Stream(block, _tap(gm, ends[block], f"prunepass_hidden_{block}"), positions, alive))
        return streams

    def masked(self, plan: PrunePlan, scorers: Mapping[int, Scorer] | None = None) -> PrunedModule:
        """Mask mode under ``plan``: the values of `pruned`, at the dense cost."""
        result = self._rewritten(plan, scorers, mode="mask")
        return PrunedModule(self._captured, result, self._model)

    def gated(self, plan: PrunePlan, gates: Sequence[Gate], scorers: Mapping[int, Scorer] | None = None) -> Gated:
        """Mask mode with a gate at each stage of ``plan``, whose keeps then only serve gates that read them.

        Raises:
            PlanError: not one gate a stage, or a stage of keep 1, which would have none.
        """
        if len(gates) != len(plan.stages) or any(s.keep == 1 for s in plan.stages):
            raise PlanError(
                f"{len(gates)} gates for a plan of {len(plan.stages)} stages; give one each, with keep < 1."
            )
        by_stage = dict(enumerate(gates))
        result = self._rewritten(plan, scorers, mode="mask", gates=by_stage)
        if result.sites:  # else it is the traced graph itself
            attend_in_float32(result.graph_module)
        return Gated(PrunedModule(self._captured, result, self._model), tuple(gates))

    def _rewritten(self, plan: PrunePlan, scorers: Mapping[int, Scorer] | None, **options: Any) -> PruneResult:
        traced = self._captured.graph_module
        return prune_graph(traced, plan, metadata=False, scorers=scorers, analysis=self._found, hoist=False, **options)

    def watched(self, hidden: Sequence[int] = (), attention: Sequence[int] = ()) -> Watched:
        """The dense model with taps on the stream before the blocks ``hidden`` (or after the last one, by the number of
        blocks) and on the attention of the blocks ``attention``."""
        found = self._found.copy()
        gm, inputs, sizes, blocks = found.gm, found.inputs, found.sizes, found.blocks
        sites = [_score_site(i, blocks[b]) for i, b in enumerate(attention)]
        plan = PrunePlan(
            tuple(Stage(b, Fraction(1, 2)) for b in sorted(set(attention))), protect=Protect(first=0)
        )  # for its scorer
        rewrite = Rewrite(gm, plan, "mask", inputs, sizes, blocks, sites)
        rewrite.level = dict.fromkeys(gm.graph.nodes, 0)
        taps_at_attention: dict[int, Tap] = {}
        runner = Runner(gm)
        if sites:
            runner.run(ReadSizesFromInputs(), rewrite)
            runner.run(InsertLive(), rewrite)
        for site in sites:
            runner.run(InsertScore(site), rewrite)
            assert site.scores is not None
            taps_at_attention[site.block.index] = _tap(gm, site.scores, f"prunepass_attention_{site.block.index}")
        streams = [*(block.start for block in blocks), blocks[-1].end]
        taps = {b: _tap(gm, streams[b], f"prunepass_hidden_{b}") for b in hidden}
        runner.run(Cleanup(metadata=False), rewrite)
        module = PrunedModule(self._captured, PruneResult(gm, plan, "mask"), self._model)
        return Watched(module, taps, taps_at_attention)


def attend_in_float32(gm: GraphModule) -> int:
    """``attention(q, k, v)`` -> the same outside of autocast, where a graph runs on a CPU. Returns how many changed.

    On CPUs the backward pass of fused attention takes two to three times as long in bf16 as in float32 (torch 2.13,
    heads of 32, up to 384 tokens). Without autocast nothing changes.
    """
    if any(p.device.type != "cpu" for p in gm.parameters()):
        return 0
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        node.target = _attention_in_float32
        count += 1
    gm.recompile()
    return count


def _attention_in_float32(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        same: Tensor = SDPA(query, key, value, mask, *args, **kwargs)
        return same
    mask = kwargs.pop("attn_mask", mask)
    with torch.autocast("cpu", enabled=False):
        wide = [t.float() for t in (query, key, value)]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        attended: Tensor = SDPA(*wide, mask, *args, **kwargs)
        return attended.to(query.dtype)


def _score_site(index: int, block: Block) -> Site:
    """A place to score by a block's own attention: right after the block."""
    scorer = scorer_class("attention")()
    return Site(index, Stage(block.index, Fraction(1, 2)), scorer, block, block.end, block.attentions)


def _tap_beside(gm: GraphModule, node: Node | None, name: str) -> Tap | None:
    return None if node is None else _tap(gm, node, name)


def _tap(gm: GraphModule, node: Node, name: str) -> Tap:
    tap = Tap()
    gm.add_submodule(name, tap)
    with gm.graph.inserting_after(node):
        tapped = gm.graph.call_module(name, (node,))
    tapped.meta = {k: v for k, v in node.meta.items() if k != "prunepass"}
    node.replace_all_uses_with(tapped, delete_user_cb=lambda user: user is not tapped)
    return tap
