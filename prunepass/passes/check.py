"""Saying what lies below each cut, and refusing what could not run there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from prunepass.errors import RefusalError
from prunepass.graph.flow import ancestors
from prunepass.graph.kinds import is_assertion
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SDPA, is_attention, is_mutable, mixes_tokens
from prunepass.graph.sizes import AXES, AxisKind
from prunepass.passes.cached import is_cached, is_drafted, refuse_fixed_cache, refuse_generation
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.reads import reads_protected_only, refuse_early_end
from prunepass.passes.short import attends_to_stream, is_memory, mixes_memory, note_short
from prunepass.passes.sizes import misread_sizes
from prunepass.passes.state import Rewrite
from prunepass.passes.windows import note_whole

__all__ = ["Check"]


@dataclass(frozen=True)
class Check(Pass):
    """Levels of all nodes; refuses what could not run soundly on a gathered sequence. Changes nothing."""

    name = "check"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if not state.sites:
            yield Fault("No stage was placed.")
        yield from misread_sizes(state)

    def run(self, state: Rewrite) -> int:
        """Raises `RefusalError` with the reason and the module path."""
        state.reads_protected = reads_protected_only(state)
        refuse_early_end(state)
        state.taps = _taps(state)
        state.level = _levels(state)
        _refuse_short(state)
        for node in [n for n, level in state.level.items() if level and is_assertion(n)]:
            state.graph.erase_node(node)  # it holds for the full sequence, or not at all
            del state.level[node]
        if is_drafted(state):
            refuse_generation(state)  # before a window's cache, which then holds more than the window
        note_whole(state)
        for node, level in state.level.items():
            if level:
                _refuse_unsound(node, state)
        _refuse_unmasked(state)
        self._outputs(state)
        return 0

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for node in state.graph.nodes:
            if node.op == "output":
                continue
            level = state.level.get(node)
            if level is None:
                yield Fault("It was not said how many cuts lie above it.", node)
                continue
            if level and is_assertion(node):
                yield Fault("It asserts something of the full sequence below a cut.", node)
            restored = [a for a in node.all_input_nodes if a is state.stream_end or node in state.taps.get(a, ())]
            above = max((state.level.get(a, 0) for a in node.all_input_nodes if a not in restored), default=0)
            if level < above:
                yield Fault(f"It stands below {level} cuts, and something that it reads below {above}.", node)
        for i, site in enumerate(state.sites):
            if state.level.get(site.cut) != i:
                yield Fault(f"The cut {site.place} does not stand below the {i} cuts before it.", site.cut)
            for user in site.cut.users:
                if site.cut is state.inputs.tokens and state.sizes.number(user) is not None:
                    continue
                if user in state.taps.get(site.cut, ()):
                    continue
                if state.level.get(user, i + 1) <= i and not (user.op == "output" or site.cut is state.stream_end):
                    yield Fault(f"It reads the cut {site.place} and is not said to stand below it.", user)

    def _outputs(self, rewrite: Rewrite) -> None:
        if rewrite.plan.restore == "none":
            note_short(rewrite)
            return
        output = next(iter(rewrite.graph.find_nodes(op="output")))
        stream = {node for block in rewrite.blocks for node in block.stream}
        for node in output.all_input_nodes:
            level = rewrite.level.get(node, 0)
            if not level or not rewrite.sizes.follows_length(node) or node in rewrite.whole:
                continue
            if node in stream:
                continue
            if rewrite.mode == "gather" and is_cached(node, rewrite):
                rewrite.cached.add(node)
                continue
            raise RefusalError(
                f"the model returns {node.name}, which carries the sequence axis of a pruned layer and cannot be "
                "restored to the full length (attention probabilities, a cache of another kind than transformers' "
                "dynamic one, or in mode='mask' any cache).",
                where=module_path(node) or node.name,
                hint="Call the model with use_cache=False and without output_attentions.",
            )
        if rewrite.cached or rewrite.whole:
            refuse_generation(rewrite)


def _taps(rewrite: Rewrite) -> dict[Node, list[Node]]:
    """Readers of the stream's middle that lead to what runs at the full length only, such as a pyramid of feature maps
    from several layers."""
    if not rewrite.sizes.whole:
        return {}
    inside = ancestors([rewrite.stream_end])
    heads = ancestors(rewrite.sizes.whole) - inside
    stream = {node for block in rewrite.blocks for node in block.stream} - {rewrite.stream_end}
    found = {value: [user for user in value.users if user in heads] for value in stream}
    return {value: users for value, users in found.items() if users}


def _refuse_short(rewrite: Rewrite) -> None:
    """What runs at the traced number of tokens only must not stand below a cut."""
    for node in rewrite.sizes.whole:
        if rewrite.level.get(node):
            raise RefusalError(
                f"{node.name} ({node.target}) runs at the traced {rewrite.inputs.fixed_length} tokens only, such as a "
                "layout of the patches as an image, and reads values of a pruned layer that are no states of the "
                "residual stream.",
                where=module_path(node) or node.name,
                hint="Place the stages after this layer.",
            )


def _levels(rewrite: Rewrite) -> dict[Node, int]:
    """How many cuts lie above each node. What follows the restored stream is at full length again: level 0."""
    cuts = {site.cut: i + 1 for i, site in enumerate(rewrite.sites)}
    level: dict[Node, int] = {}
    for node in rewrite.graph.nodes:
        if node.op == "output":
            continue
        above = 0
        of_tokens = rewrite.sizes.number(node) is not None and node.target is torch.ops.aten.sym_size.int
        for a in node.all_input_nodes:
            if a is rewrite.stream_end and not rewrite.leaves_short:
                continue
            if node in rewrite.taps.get(a, ()):
                continue  # restored for it
            if a is rewrite.inputs.tokens and of_tokens:
                continue  # the full length, also where the first cut is the tokens themselves
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
    if is_mutable(node):
        raise RefusalError(
            f"{node.target} ({node.name}) changes a tensor in place below a cut, and what else shows that tensor "
            "cannot be told from the graph.",
            where=where,
            hint="Write it without the change in place (x = x + y, torch.where, masked_fill), or prune an exported "
            "program: prune(program.run_decompositions({}), plan).",
        )
    memory = rewrite.plan.restore == "none" and mixes_memory(node, rewrite.sizes)
    unmixed = memory or node in rewrite.slices or _is_protected_read(node, rewrite)
    reason = None if unmixed else mixes_tokens(node, rewrite.sizes)
    if reason and {user.op for user in node.users} == {"output"}:
        raise RefusalError(
            f"{reason} ({node.name}), which the model only returns: a cache that holds a part of the tokens, say. Of a "
            "pruned layer it would hold others.",
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
    # masks that are inputs (`passes.past`) were made of the attention mask
    content, told = {rewrite.inputs.source}, {mask, *(n for n in rewrite.placeholders if AXES in n.meta)}
    for node in rewrite.graph.nodes:
        if any(a in content for a in node.all_input_nodes):
            content.add(node)
        elif any(a in told for a in node.all_input_nodes):
            told.add(node)
    stream = {n for b in rewrite.blocks for n in (b.start, b.after_attention, b.end)}
    for node in rewrite.graph.nodes:
        if not rewrite.level.get(node) or not (is_attention(node, rewrite.sizes) or is_memory(node, rewrite.sizes)):
            continue
        if not attends_to_stream(node, rewrite.sizes):
            continue  # a decoder's, over tokens of its own
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
