"""Putting a plan's stages onto a model's cuts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from prunepass.errors import PlanError, RefusalError
from prunepass.graph.blocks import Block
from prunepass.graph.flow import Depths
from prunepass.graph.modules import layer_path, module_path
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.segments import check_readable
from prunepass.passes.state import Rewrite, Site
from prunepass.plan import PrunePlan
from prunepass.plan.levels import Levels
from prunepass.scorers import Scorer, scorer_class
from prunepass.scorers.lens import PREFIX, Lens

__all__ = ["Place", "place"]


def place(
    plan: PrunePlan,
    blocks: tuple[Block, ...],
    width: int,
    scorers: Mapping[int, Scorer] | None = None,
    levels: Levels | None = None,
) -> list[Site]:
    """The sites of a plan's stages that prune anything (keep under 1), in order.

    Args:
        width: of the hidden state, which trained predictors must fit.
        scorers: modules to use as they are, by stage; the others are made from the plan.
        levels: the plans that ``plan`` has the stages of.

    Raises:
        PlanError: a layer that the model does not have, a scorer that cannot work at its place.
        WeightsError: predictor weights for another width.
    """
    sites: list[Site] = []
    for index, stage in enumerate(plan.stages):
        if stage.layer >= len(blocks):
            raise PlanError(_no_such_layer(stage.layer, blocks))
        spec = plan.scorer_of(index)
        scorer = (scorers or {}).get(index)
        variants: list[Scorer] = []
        which: list[int] = []
        if scorer is None:
            sets, which = levels.weights_of(index) if levels is not None else ([plan.all_weights_of(index)], [])
            variants = [_scorer(plan, index, weights, width) for weights in sets]
            scorer = variants[0]
        block = blocks[stage.layer]
        attended = block if stage.after_attention else blocks[stage.layer - 1] if stage.layer else None
        if scorer.needs_attention and attended is None:
            raise PlanError(
                f"The scorer {spec.name!r} reads the attention of the block before, and there is none before block 0. "
                "Place the stage at layer 1 or later, use after_attention, or take another scorer."
            )
        if stage.keep == 1:
            continue
        cut = block.after_attention if stage.after_attention else block.start
        if sites and sites[-1].cut is cut:
            raise PlanError(
                f"The stages {sites[-1].place} and {stage.place} fall on one cut: between them is no value of shape "
                "[batch, tokens, width] that every path goes through, as where attention and feed-forward part run in "
                f"parallel ({block.path or 'block ' + str(block.index)}). Drop one of the two."
            )
        site = Site(index, stage, scorer, block, cut, attended.attentions if attended else ())
        if len(variants) > 1:
            site.variants, site.which = tuple(variants), tuple(which)
        sites.append(site)
    return sites


def _scorer(plan: PrunePlan, index: int, weights: Mapping[str, Tensor], width: int) -> Scorer:
    """Of a stage, with these weights: its own and those of its lens."""
    stage, spec = plan.stages[index], plan.scorer_of(index)
    own = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    scorer = scorer_class(spec.name).load(dict(spec.options), own, width, stage.place)
    lens = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    if plan.restore == "lens" and lens:
        scorer.lens = Lens.load(lens, width, stage.place)
    return scorer


def _refuse_several_streams(state: Rewrite) -> None:
    """Raises `RefusalError` where the value at a cut is more than a hidden state a token."""
    for site in state.sites:
        if len(state.sizes.axes(site.cut) or ()) > 3:
            shape = ", ".join(["batch", "tokens", *map(str, state.value(site.cut).shape[2:])])
            raise RefusalError(
                f"the residual stream {site.place} is of shape [{shape}], several states for each token, which scorers "
                "do not know.",
                where=site.path or site.cut.name,
                hint="prunepass prunes models with one hidden state a token, [batch, tokens, width].",
            )


def _no_such_layer(layer: int, blocks: tuple[Block, ...]) -> str:
    text = f"The plan has a stage at layer {layer}, but this model has {len(blocks)} blocks, 0 to {len(blocks) - 1}."
    numbers = [re.search(r"\d+", block.path) for block in blocks]
    if any(n is not None and int(n[0]) != i for i, n in enumerate(numbers)):
        named = ", ".join(f"block {block.index} is {block.path}" for block in blocks)
        text += f" Only layers with attention are blocks: {named}."
    for block in blocks:
        layers = list(dict.fromkeys(layer_path(module_path(a)) for a in block.attentions))
        if len(layers) > 1:
            text += (
                f" Block {block.index} holds {len(layers)} layers with attention ({layers[0]} to {layers[-1]}): "
                "between them is no value of shape [batch, tokens, width] that every path to the output goes through."
            )
    return text


@dataclass(frozen=True)
class Place(Pass):
    """``plan`` -> a site at each cut where it prunes, in the order of the model. Changes nothing in the graph.

    Attributes:
        scorers: modules to use as they are, by stage; the others are made from the plan.
    """

    scorers: Mapping[int, Scorer] = field(default_factory=dict)
    name = "place"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if not state.blocks:
            yield Fault("No blocks were found.")
        for node in state.graph.nodes:
            if node.op != "output" and not (node in state.sizes.first.values and node in state.sizes.second.values):
                yield Fault("Its size was not measured.", node)

    def run(self, state: Rewrite) -> int:
        """Sets ``state.sites``; returns how many. Raises `PlanError` where the plan does not fit the model."""
        width = state.value(state.blocks[0].start).shape[-1]
        state.sites = place(state.plan, state.blocks, width, self.scorers, state.levels)
        _refuse_several_streams(state)
        check_readable(state.plan.protect, state.inputs)
        return len(state.sites)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        if [site.index for site in state.sites] != [i for i, s in enumerate(state.plan.stages) if s.keep != 1]:
            yield Fault("Not each stage that prunes has one site.")
        for site in state.sites:
            axes = state.sizes.axes(site.cut) or ()
            if len(axes) != 3 or not axes[1].is_sequence or axes[0].follows_length or axes[2].follows_length:
                yield Fault(f"The cut {site.place} is no value of shape [batch, tokens, width].", site.cut)
        yield from _ways_around(state)


def _ways_around(state: Rewrite) -> Iterator[Fault]:
    """Sites that some path from the tokens to the end of the stream does not go through, or not in order."""
    cuts = {site.cut: i for i, site in enumerate(state.sites)}
    depths = Depths(state.graph, state.inputs.source, state.sizes)
    passed: dict[Node, int] = {}  # fewest cuts on a path from the tokens
    for node in state.graph.nodes:
        if state.sizes.number(node) is not None:
            continue  # sizes carry no content
        paths = [passed[a] for a in node.all_input_nodes if a in passed and not depths.is_beside(a, node)]
        if node is not state.inputs.source and not paths:
            continue
        fewest = min(paths, default=0)
        at = cuts.get(node)
        if at is not None and fewest != at:
            site = state.sites[at]
            yield Fault(f"A path leads to the cut {site.place} around a cut before it.", node)
        passed[node] = fewest + (at is not None)
    if passed.get(state.stream_end, 0) != len(state.sites):
        yield Fault("A path leads to the end of the residual stream around a cut.", state.stream_end)
