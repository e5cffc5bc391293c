"""The language model of a vision-language model, called with embeddings that images were put into.

Its graph has no ids, and its masks may be inputs that say nothing of padding by themselves. What a pass needs of the
outer call stands in one operator, ``prompt(embeds, ids, mask, widths)``, which hands the embeddings on. It is taken out
of the graph before that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import ModelInputs, Prompt, fake_value, given_inputs, hint, is_parameter
from prunepass.graph.sizes import AXES, AxisKind

__all__ = ["drop_prompt", "mark_prompt", "prompt_inputs", "take_prompt"]

_LIBRARY = torch.library.Library("prunepass", "FRAGMENT")
_LIBRARY.define("prompt(Tensor embeds, Tensor ids, Tensor mask, SymInt[] widths) -> Tensor")

#: key of the embeddings' ``meta``
_PROMPT = "prunepass_prompt"


@torch.library.impl(_LIBRARY, "prompt", "CompositeExplicitAutograd")
def _prompt(embeds: Tensor, ids: Tensor, mask: Tensor, widths: Any) -> Tensor:
    return embeds.clone()


@dataclass(frozen=True)
class _Names:
    """Of placeholders, which stay when a graph is copied; numbers are themselves."""

    ids: str
    mask: str
    widths: tuple[str | int, ...]


def mark_prompt(embeds: Tensor, ids: Tensor, mask: Tensor, widths: list[int]) -> Tensor:
    """``embeds``, and in a traced graph what else is known of the prompt.

    Args:
        embeds: [B, S, D] floating.
        ids: [B, S] int64, with placeholders where images stand.
        mask: [B, S] int64, 1 at live tokens.
        widths: for each stage of the plan, how many slots it leaves; empty where that follows from the length.
    """
    marked: Tensor = torch.ops.prunepass.prompt(embeds, ids, mask, widths)
    return marked


def take_prompt(gm: GraphModule) -> None:
    """Take the operator out of an ATen graph, which is edited; what it said is noted for `prompt_inputs`."""
    found = [n for n in gm.graph.nodes if n.target is torch.ops.prunepass.prompt.default]
    for node in found:
        embeds, ids, mask, widths = node.args
        embeds.meta[_PROMPT] = _Names(
            ids.name, mask.name, tuple(w.name if isinstance(w, Node) else int(w) for w in widths)
        )
        node.replace_all_uses_with(embeds)
        gm.graph.erase_node(node)
        _note_axes(gm, embeds)
    if found:
        gm.recompile()


def drop_prompt(gm: GraphModule) -> None:
    """Take the operator out of Dynamo's graph, or an ATen one, that is to run as it is."""
    packet = torch.ops.prunepass.prompt
    for node in [n for n in gm.graph.nodes if n.target in (packet, packet.default)]:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        gm.recompile()


def prompt_inputs(gm: GraphModule) -> ModelInputs | None:
    """The inputs of a graph that `take_prompt` read; None for any other."""
    placeholders = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    embeds = next((n for n in placeholders.values() if _PROMPT in n.meta), None)
    if embeds is None:
        return None
    names: _Names = embeds.meta[_PROMPT]
    widths = tuple(placeholders[w] if isinstance(w, str) else w for w in names.widths)
    sizes = [hint(n) for n in fake_value(embeds).shape[:2]]
    sequence = tuple(n for n in given_inputs(gm) if _sizes(n)[:2] == sizes and AXES not in n.meta)
    return ModelInputs(
        embeds, embeds, placeholders[names.mask], sequence, prompt=Prompt(placeholders[names.ids], widths)
    )


def _note_axes(gm: GraphModule, embeds: Node) -> None:
    """Which axes of the other inputs are the batch and the length: positions of several kinds, masks of all pairs."""
    rows, length = (hint(n) for n in fake_value(embeds).shape[:2])
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        if not isinstance(value, Tensor) or is_parameter(node):
            continue
        shape = _sizes(node)
        if len(shape) == 4 and shape[2:] == [length, length]:
            node.meta[AXES] = {2: AxisKind.SEQ, 3: AxisKind.SEQ}
            if shape[0] == rows and not (rows == 1 and fake_value(embeds).shape[0] == 1):
                node.meta[AXES][0] = AxisKind.BATCH
        elif len(shape) == 3 and shape[1:] == [rows, length] and not value.is_floating_point():
            node.meta[AXES] = {1: AxisKind.BATCH, 2: AxisKind.SEQ}
        elif len(shape) == 2 and shape == [1, length] and rows > 1 and not value.is_floating_point():
            node.meta[AXES] = {1: AxisKind.SEQ}


def _sizes(node: Node) -> list[int]:
    return [hint(n) for n in fake_value(node).shape]
