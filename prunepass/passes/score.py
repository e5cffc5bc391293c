"""Inserting a scorer at a cut: ``h`` -> ``h, score(h, ...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.errors import RefusalError
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SDPA, attention_arguments
from prunepass.graph.sizes import AxisKind
from prunepass.graph.trace import Extent, Operand
from prunepass.passes.contract import Fault, SitePass, is_ours, layout_faults
from prunepass.passes.state import Rewrite, Site, latest
from prunepass.passes.take import take
from prunepass.passes.variants import weights_of_level
from prunepass.scorers import Attention, ScoreInputs
from prunepass.scorers.lens import PREFIX

__all__ = ["InsertScore"]

_FIELDS = {field.name for field in fields(ScoreInputs)}


@dataclass(frozen=True)
class InsertScore(SitePass):
    """Puts the scorer's own operations into the graph right after the cut, its weights beside the model's."""

    name = "score"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        if state.live is None:
            yield Fault("Nothing says which tokens are live.", self.site.cut)
        before = state.sites[: state.sites.index(self.site)] if state.mode == "gather" else []
        for site in before:
            if site.narrowed is None:
                yield Fault(f"The stage {site.place} was not narrowed.", site.cut)

    def run(self, state: Rewrite) -> int:
        """Sets ``site.scores`` ([B, T]), and at a stage that merges ``site.vectors`` and ``levels``. Raises `TypeError`
        for a scorer that returns no tensor of this shape."""
        rewrite, site = state, self.site
        # attention may have run before a stage that stands between it and this cut: then it is scored as it ran
        scored_at = self._site_after_attention(rewrite, site)
        given: dict[str, Operand] = self._inputs(rewrite, scored_at)
        read = site.attentions if site.scorer.needs_attention else ()
        attentions = [_attention(rewrite, node, given, site.scorer.name) for node in read]
        attached = _attach_weights(rewrite, site) if len(site.variants) < 2 else weights_of_level(rewrite, site)
        weights = {name: node for name, node in attached.items() if not name.startswith(PREFIX)}
        site.lens = {k.removeprefix(PREFIX): node for k, node in attached.items() if k not in weights}
        names, slots = list(given), given["hidden"].shape[1]
        tokens = self._constant_slots(rewrite, scored_at, given)
        if tokens is not None:
            given = {name: _with_size(operand, slots, tokens) for name, operand in given.items()}
            slots = tokens

        def build(*values: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
            found = dict(zip(names, values[: len(names)], strict=True))
            seen: dict[str, Any] = {name: value for name, value in found.items() if name in _FIELDS}
            seen["tokens"] = tokens
            inputs = ScoreInputs(**{"alive": None} | seen)
            parameters = dict(zip(weights, values[len(names) :], strict=True))
            variants = [replace(inputs, attention=make(found)) for make in attentions] or [inputs]
            scores = _mean([_call(site, variant, parameters) for variant in variants])
            return scores, *_hosts(site, variants)

        operands = [*given.values(), *(rewrite.operands[n] for n in weights.values())]
        with rewrite.graph.inserting_after(site.cut):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (site.cut,))
        # an attention scorer may read values that stand after the cut's own node in the graph's order
        with rewrite.graph.inserting_after(latest(anchor, *(o.node for o in operands))):
            end = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (site.cut,))
        with rewrite.graph.inserting_before(end):
            site.scores, vectors, levels = rewrite.inline(build, operands, stage=site.index, role=self.name)
        rewrite.graph.erase_node(end)
        rewrite.graph.erase_node(anchor)
        dtype = torch.float64 if rewrite.value(site.cut).dtype == torch.float64 else torch.float32
        if not isinstance(site.scores, Node) or any(layout_faults(rewrite, site.scores, "scores", ("B", slots))):
            raise TypeError(f"The scorer {site.scorer.name!r} must return one tensor of shape [batch, tokens].")
        with rewrite.graph.inserting_after(site.scores):
            scores = rewrite.graph.call_function(torch.ops.aten.to.dtype, (site.scores, dtype))
        layout = replace(site.scores.meta["layout"], dtype=dtype)
        mine = {**site.scores.meta["prunepass"], "dtype": dtype}
        scores.meta = {**site.scores.meta, "layout": layout, "prunepass": mine}
        first, last = rewrite.sites.index(scored_at), rewrite.sites.index(site)
        between = rewrite.sites[first:last]
        site.scores = self._at_kept(rewrite, scores, between)
        site.vectors = None if vectors is None else self._vectors_at_kept(rewrite, vectors, between)
        site.levels = None if levels is None else self._at_kept(rewrite, levels, between)
        return 1

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        scores = self.site.scores
        if scores is None:
            yield Fault("There are no scores.", self.site.cut)
            return
        if not state.score_dtype(self.site).is_floating_point:
            yield Fault(f"The scores are {state.score_dtype(self.site)}.", scores)
        above = state.sites.index(self.site)
        for node in state.graph.nodes:
            if not self.is_mine(node):
                continue
            for a in node.all_input_nodes:
                if not is_ours(a) and state.level.get(a, 0) > above:
                    yield Fault(f"It scores tokens by {a.name}, which stands below the cut.", node)

    def _site_after_attention(self, rewrite: Rewrite, site: Site) -> Site:
        """The first site whose cut lies below the attention that this one reads: itself, but for stages in between."""
        if not site.scorer.needs_attention:
            return site
        return rewrite.sites[rewrite.level[site.attentions[0]]]

    def _constant_slots(self, rewrite: Rewrite, site: Site, given: dict[str, Operand]) -> int | None:
        """How many slots reach the site, where that is a constant and no operand has another open size beside it: a
        scorer may then compute sizes from it."""
        at = rewrite.sites.index(site)
        slots = given["hidden"].shape[1]
        names = {e.partition("*")[0] for o in given.values() for e in o.shape if isinstance(e, str)}
        if rewrite.mode != "gather" or not names <= {"B", slots}:
            return None
        return rewrite.constant_slots(rewrite.sites[at - 1] if at else None)

    def _at_kept(self, rewrite: Rewrite, scores: Node, between: list[Site]) -> Node:
        """Scores of the slots that the stages in between kept."""
        if rewrite.mode != "gather":
            return scores
        for passed in between:
            assert passed.kept is not None
            assert passed.kept.index is not None
            with rewrite.graph.inserting_after(latest(scores, passed.kept.index)):
                gathered = rewrite.graph.call_function(torch.ops.aten.gather.default, (scores, 1, passed.kept.index))
            gathered.meta = {k: v for k, v in scores.meta.items() if k != "layout"}
            scores = gathered
        return scores

    def _vectors_at_kept(self, rewrite: Rewrite, vectors: Node, between: list[Site]) -> Node:
        """Of a token that took others in, its own."""
        if rewrite.mode != "gather":
            return vectors
        layout = vectors.meta["layout"]
        for passed in between:
            assert passed.kept is not None
            index = passed.kept.index
            assert index is not None
            slots = "S" if rewrite.kept_before(passed) is None else "T"
            operands = [
                Operand(vectors, ("B", slots, layout.shape[-1][0]), layout.dtype, rewrite.device),
                rewrite.operand(index, "B", "K", dtype=torch.int64),
            ]
            with rewrite.graph.inserting_after(latest(vectors, index)):
                anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (vectors,))
            with rewrite.graph.inserting_before(anchor):
                vectors = rewrite.inline(
                    lambda x, at: take(x, at, 1, 0),
                    operands,
                    stage=self.site.index,
                    role=self.name,
                    key=("take", 1, 0),
                )
            rewrite.graph.erase_node(anchor)
        return vectors

    def _inputs(self, rewrite: Rewrite, site: Site) -> dict[str, Operand]:
        assert rewrite.live is not None
        live, before = rewrite.live, rewrite.kept_before(site)
        gathered = before is not None and rewrite.mode == "gather"
        slots = "T" if gathered else "S"
        hidden = rewrite.value(site.cut)
        rank = rewrite.at_slots(live.rank, before) if gathered else live.rank
        alive = before.alive if before is not None else live.alive
        ids = rewrite.inputs.token_ids
        assert rank is not None
        given = {
            "hidden": Operand(site.cut, ("B", slots, hidden.shape[-1]), hidden.dtype, rewrite.device),
            "rank": rewrite.operand(rank, "B", slots, dtype=torch.int64),
            "end": rewrite.operand(live.end, "B", 1, dtype=torch.int64),
        }
        if alive is not None:
            given["alive"] = rewrite.operand(alive, "B", slots, dtype=torch.bool)
        if live.leaving is not None:
            told = rewrite.at_slots(live.protected, before) if gathered else live.protected
            assert told is not None
            given["protected"] = rewrite.operand(told, "B", slots, dtype=torch.int64)
        if ids is not None:
            found = rewrite.at_slots(ids, before) if gathered else ids
            assert found is not None
            given["token_ids"] = rewrite.operand(found, "B", slots, dtype=rewrite.value(ids).dtype)
        return given


def _with_size(operand: Operand, name: Extent, size: int) -> Operand:
    return replace(operand, shape=tuple(size if extent == name else extent for extent in operand.shape))


def _attention(
    rewrite: Rewrite, node: Node, given: dict[str, Operand], scorer: str
) -> Callable[[dict[str, Tensor]], Attention]:
    """Adds what one attention node reads to ``given``; returns how to make an `Attention` of it."""
    length = str(given["hidden"].shape[1])

    def note(name: str, source: Any) -> str | None:
        if not isinstance(source, Node):
            return None
        key = f"{name}_of_{node.name}"
        given[key] = rewrite.operand(source, length=length)
        return key

    if node.target is not SDPA:
        probabilities = note("probabilities", node)

        def from_softmax(found: dict[str, Tensor]) -> Attention:
            assert probabilities is not None
            p = found[probabilities]
            return Attention(probabilities=p.reshape(found["hidden"].shape[0], -1, p.shape[-2], p.shape[-1]))

        return from_softmax
    arguments = attention_arguments(node)
    _refuse_layout(rewrite, node, arguments, scorer)
    query, key, mask = (note(n, arguments.get(n)) for n in ("query", "key", "attn_mask"))
    is_causal, scale = bool(arguments.get("is_causal", False)), arguments.get("scale")

    def from_sdpa(found: dict[str, Tensor]) -> Attention:
        assert query is not None
        assert key is not None
        rows = found["hidden"].shape[0]
        q, k = (x if x.dim() == 4 else x.reshape(rows, -1, *x.shape[-2:]) for x in (found[query], found[key]))
        return Attention(q, k, found[mask] if mask else None, is_causal, scale)

    return from_sdpa


def _refuse_layout(rewrite: Rewrite, node: Node, arguments: dict[str, Any], scorer: str) -> None:
    """Queries are [B, H, T, d]; without a mask also [B * H, T, d]."""
    axes = rewrite.sizes.axes(arguments["query"])
    if axes is None:
        return
    folded = len(axes) == 3 and arguments.get("attn_mask") is None
    whole = len(axes) == 4 and axes[1].kind is not AxisKind.BATCH
    if not (folded or whole) or not axes[-2].is_sequence:
        raise RefusalError(
            f"the scorer {scorer!r} reads queries of the shape [batch, heads, tokens, width], and those of this "
            "attention have another.",
            where=module_path(node) or node.name,
            hint="Choose another scorer, such as 'norm' or 'mlp'.",
        )


def _call(site: Site, inputs: ScoreInputs, parameters: dict[str, Tensor]) -> Tensor:
    scores: Tensor = (
        torch.func.functional_call(site.scorer, parameters, (inputs,)) if parameters else site.scorer(inputs)
    )
    return scores


def _hosts(site: Site, variants: list[ScoreInputs]) -> tuple[Tensor | None, Tensor | None]:
    if site.stage.leave != "merge":
        return None, None
    found = [site.scorer.hosts(variant) for variant in variants]
    vectors = [hosts.vectors for hosts in found if hosts.vectors is not None]
    return torch.cat(vectors, dim=-1) if vectors else None, found[0].levels


def _mean(scores: list[Tensor]) -> Tensor:
    total = scores[0]
    for other in scores[1:]:
        total = total + other
    return total / len(scores) if len(scores) > 1 else total


def _attach_weights(rewrite: Rewrite, site: Site) -> dict[str, Node]:
    """Register the scorer on the graph module, in the model's dtype and device; one ``get_attr`` a parameter."""
    state = dict(site.scorer.named_parameters()) | dict(site.scorer.named_buffers())
    if not state:
        return {}
    hidden = rewrite.value(site.cut)
    site.scorer.to(device=rewrite.device, dtype=hidden.dtype)
    name = f"prunepass_scorer_{site.index}"
    rewrite.gm.add_submodule(name, site.scorer)
    nodes = {}
    for parameter, tensor in {**dict(site.scorer.named_parameters()), **dict(site.scorer.named_buffers())}.items():
        with rewrite.graph.inserting_before(next(iter(rewrite.graph.nodes))):
            node = rewrite.graph.get_attr(f"{name}.{parameter}")
        node.meta = {"prunepass": {"stage": site.index, "pass": "score"}}
        rewrite.operands[node] = Operand(node, tuple(tensor.shape), tensor.dtype, tensor.device)
        nodes[parameter] = node
    return nodes
