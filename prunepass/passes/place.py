"""Putting a plan's stages onto a model's cuts, and saying what lies below each cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from prunepass.errors import PlanError, RefusalError
from prunepass.graph.blocks import Block
from prunepass.graph.kinds import is_assertion
from prunepass.graph.modules import layer_path, module_path
from prunepass.graph.ops import SDPA, is_attention, mixes_tokens
from prunepass.graph.sizes import AxisKind
from prunepass.passes.cached import is_cached, refuse_fixed_cache, refuse_generation
from prunepass.passes.reads import reads_protected_only
from prunepass.passes.state import Rewrite, Site
from prunepass.plan import PrunePlan
from prunepass.scorers import Scorer, scorer_class
from prunepass.scorers.lens import Lens

__all__ = ["Check", "place"]


def place(
    plan: PrunePlan, blocks: tuple[Block, ...], width: int, scorers: Mapping[int, Scorer] | None = None
) -> list[Site]:
    """The sites of a plan's stages that prune anything (keep under 1), in order.

    Args:
        width: of the hidden state, which trained predictors must fit.
        scorers: modules to use as they are, by stage; the others are made from the plan.

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
        if scorer is None:
            scorer = scorer_class(spec.name).load(dict(spec.options), plan.weights_of(index), width, stage.place)
            if plan.restore == "lens" and (lens := plan.lens_of(index)):
                scorer.lens = Lens.load(lens, width, stage.place)
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
        sites.append(Site(index, stage, scorer, block, cut, attended.attentions if attended else ()))
    return sites


def _no_such_layer(layer: int, blocks: tuple[Block, ...]) -> str:
    text = f"The plan has a stage at layer {layer}, but this model has {len(blocks)} blocks, 0 to {len(blocks) - 1}."
    for block in blocks:
        layers = list(dict.fromkeys(layer_path(module_path(a)) for a in block.attentions))
        if len(layers) > 1:
            text += (
                f" Block {block.index} holds {len(layers)} layers with attention ({layers[0]} to {layers[-1]}): "
                "between them is no value of shape [batch, tokens, width] that every path to the output goes through."
            )
    return text


@dataclass(frozen=True)
class Check:
    """Levels of all nodes; refuses what could not run soundly on a gathered sequence. Changes nothing."""

    name = "check"

    def run(self, rewrite: Rewrite) -> int:
        """Raises `RefusalError` with the reason and the module path."""
        rewrite.reads_protected = reads_protected_only(rewrite)
        rewrite.level = _levels(rewrite)
        for node in [n for n, level in rewrite.level.items() if level and is_assertion(n)]:
            rewrite.graph.erase_node(node)  # it holds for the full sequence, or not at all
            del rewrite.level[node]
        for node, level in rewrite.level.items():
            if level:
                _refuse_unsound(node, rewrite)
        _refuse_unmasked(rewrite)
        self._outputs(rewrite)
        return 0

    def _outputs(self, rewrite: Rewrite) -> None:
        output = next(iter(rewrite.graph.find_nodes(op="output")))
        stream = {node for block in rewrite.blocks for node in block.stream}
        for node in output.all_input_nodes:
            level = rewrite.level.get(node, 0)
            if not level or not rewrite.sizes.follows_length(node):
                continue
            if node in stream:
                continue
            if rewrite.mode == "gather" and is_cached(node, rewrite):
                rewrite.cached.add(node)
                continue
            raise RefusalError(
                f"the model returns {node.name}, which carries the sequence axis of a pruned layer and cannot be "
                "restored to the full length (attention probabilities, a cache that holds a window, or in "
                "mode='mask' any cache).",
                where=module_path(node) or node.name,
                hint="Call the model with use_cache=False and without output_attentions.",
            )
        if rewrite.cached:
            refuse_generation(rewrite)


def _levels(rewrite: Rewrite) -> dict[Node, int]:
    """How many cuts lie above each node. What follows the restored stream is at full length again: level 0."""
    cuts = {site.cut: i + 1 for i, site in enumerate(rewrite.sites)}
    level: dict[Node, int] = {}
    for node in rewrite.graph.nodes:
        if node.op == "output":
            continue
        above = 0
        for a in node.all_input_nodes:
            if a is rewrite.stream_end and not rewrite.reads_protected:
                continue
            above = max(above, cuts.get(a, level[a]))
        level[node] = above
    return level


def _attends_along_rows(node: Node, rewrite: Rewrite) -> bool:
    key = node.args[1]
    axes = (rewrite.sizes.axes(key) or ()) if isinstance(key, Node) else ()
    return len(axes) > 1 and axes[-2].kind is AxisKind.BATCH


def _refuse_unsound(node: Node, rewrite: Rewrite) -> None:
    where = module_path(node) or node.name
    refuse_fixed_cache(node, rewrite)
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        raise RefusalError(
            f"{node.target} ({node.name}) changes a tensor in place below a cut, and what else shows that tensor "
            "cannot be told from the graph.",
            where=where,
            hint="Write it without the change in place (x = x + y, torch.where, masked_fill), or prune an exported "
            "program: prune(program.run_decompositions({}), plan).",
        )
    reason = None if _is_protected_read(node, rewrite) else mixes_tokens(node, rewrite.sizes)
    if reason and {user.op for user in node.users} == {"output"}:
        raise RefusalError(
            f"{reason} ({node.name}), which the model only returns: a cache that holds a window of the last tokens, "
            "say. Of a pruned layer it would hold others.",
            where=where,
            hint="Call the model with use_cache=False, or place the stages after this layer.",
        )
    if reason:
        raise RefusalError(
            f"{reason} ({node.name}), so tokens cannot leave before it.",
            where=where,
            hint="Place the stages after this layer, or compile with fallback='dense' to run the model unpruned.",
        )
    if node.target is SDPA and _attends_along_rows(node, rewrite):
        raise RefusalError(
            f"{node.name} attends along the first axis of the inputs, which prunepass takes for the batch.",
            where=where,
            hint="Pass tokens as [batch, length, width], to a model built with batch_first=True, or transpose them in "
            "a module around the model.",
        )
    if node.target is SDPA and not all(rewrite.level[a] for a in node.args[1:3] if isinstance(a, Node)):
        raise RefusalError(
            f"{node.name} attends to something else than the tokens (cross-attention, or a memory).",
            where=where,
            hint="prunepass prunes encoders and decoders with self-attention.",
        )


def _refuse_unmasked(rewrite: Rewrite) -> None:
    """A model told where padding is must hide it in each attention below a cut, which hides surplus slots too."""
    mask = rewrite.inputs.attention_mask
    if mask is None:
        return
    content, told = {rewrite.inputs.source}, {mask}
    for node in rewrite.graph.nodes:
        if any(a in content for a in node.all_input_nodes):
            content.add(node)
        elif any(a in told for a in node.all_input_nodes):
            told.add(node)
    stream = {n for b in rewrite.blocks for n in (b.start, b.after_attention, b.end)}
    for node in rewrite.graph.nodes:
        if not rewrite.level.get(node) or not is_attention(node, rewrite.sizes):
            continue
        if not _reads(node, told, stream):
            raise RefusalError(
                f"the model takes an attention mask, but {node.name} does not use it, so it attends to padding.",
                where=module_path(node) or node.name,
                hint="Call the model without attention_mask, one text at a time.",
            )


def _reads(node: Node, wanted: set[Node], stop: set[Node]) -> bool:
    """Whether a node reads one of ``wanted``, itself or through nodes up to ``stop``."""
    seen, todo = {node}, [node]
    while todo:
        for a in todo.pop().all_input_nodes:
            if a in wanted:
                return True
            if a not in seen and a not in stop:
                seen.add(a)
                todo.append(a)
    return False


def _is_protected_read(node: Node, rewrite: Rewrite) -> bool:
    """In a head that was found to read protected tokens only, picking one of them out is fine."""
    if not rewrite.reads_protected or is_attention(node, rewrite.sizes):
        return False
    return node.name in rewrite.protected_reads
