"""Weights that differ from plan to plan: all of them side by side, and those of the call's level read out."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from prunepass.graph.trace import Operand
from prunepass.passes.state import Rewrite, Site

__all__ = ["weights_of_level"]

aten = torch.ops.aten
#: the pass that these are part of
_ROLE = "score"


def weights_of_level(state: Rewrite, site: Site) -> dict[str, Node]:
    """Nodes of the weights of a site's scorer at the level of the call, by parameter name.

    All parameters of a stage are looked up at once, in a table with a row for each set of them, in the model's dtype,
    and then told apart: runtimes pay for each operator. A set that several levels take stands there once.
    """
    like = state.value(site.cut)
    sets = [dict(scorer.named_parameters()) | dict(scorer.named_buffers()) for scorer in site.variants]
    rows = [torch.cat([value.detach().reshape(-1) for value in one.values()]) for one in sets]
    name = f"prunepass_weights_{site.index}"
    stacked = torch.stack(rows).to(like.dtype)
    table = state.buffer(name, stacked, stage=site.index, role=_ROLE, persistent=True).node
    at = state.indices.get(site.which)
    if at is None:
        at = state.indices[site.which] = _index(state, site)
    with state.graph.inserting_after(max(table, at)):
        row = _call(state, site, aten.embedding.default, table, at)
    sizes = [value.numel() for value in sets[0].values()]
    with state.graph.inserting_after(row):
        parts = _call(state, site, aten.split_with_sizes.default, row, sizes)
    found: dict[str, Node] = {}
    last = parts
    for i, (key, value) in enumerate(sets[0].items()):
        with state.graph.inserting_after(last):
            last = _call(state, site, operator.getitem, parts, i)
        if value.dim() != 1:
            with state.graph.inserting_after(last):
                last = _call(state, site, aten.view.default, last, list(value.shape))
        found[key] = last
        state.operands[last] = Operand(last, tuple(value.shape), like.dtype, state.device)
    return found


def _index(state: Rewrite, site: Site) -> Node:
    """A number, [] int64: which set of weights the level takes."""
    assert state.chosen is not None
    which = torch.tensor(site.which, device=state.device)
    name = f"prunepass_which_{site.index}"
    table = state.buffer(name, which, stage=site.index, role=_ROLE, persistent=False).node
    with state.graph.inserting_after(state.chosen):
        found = _call(state, site, aten.index_select.default, table, 0, state.chosen)
    with state.graph.inserting_after(found):
        return _call(state, site, aten.select.int, found, 0, 0)


def _call(state: Rewrite, site: Site, function: object, *args: object) -> Node:
    node: Node = state.graph.call_function(function, args)  # type: ignore[arg-type]  # operators of torch
    node.meta = {"prunepass": {"stage": site.index, "pass": _ROLE}}
    return node
