"""Following a cache from the prompt on: graphs that give the scores of their tokens, and calls that cut caches.

The graph of a prompt returns the scores that its stages chose by. The graph of a later call is run as it is and also
returns the hidden states at the plan's cuts, which the same scorers score. Every so many tokens the caches that the
call returns are cut, before it gives them to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.errors import OptionError, RefusalError
from prunepass.generation.attention import expect_empty_slots
from prunepass.generation.decode import Decode, Scores, carry_rows, cut, keep_scores, scores_of, taken
from prunepass.graph.blocks import find_blocks
from prunepass.graph.inputs import MASK_NAMES, ModelInputs, embedded, fake_value, given_inputs, input_name
from prunepass.graph.ops import SOFTMAX
from prunepass.graph.sizes import Axis, AxisKind, Sizes, concrete
from prunepass.graph.streams import find_inputs
from prunepass.passes.place import place
from prunepass.passes.scores import Returned
from prunepass.passes.segments import named_tokens
from prunepass.passes.state import Site
from prunepass.passes.windows import cut_to_window
from prunepass.plan import Protect, PrunePlan, ScorerSpec, protected_last
from prunepass.plan.draft import Draft, Planned
from prunepass.scorers import ScoreInputs, scorer_class
from prunepass.scorers.base import as_scores

__all__ = ["LaterCall", "after_later_call", "after_prompt", "check_scorers", "later_call", "with_empty_padding"]

aten = torch.ops.aten
Lowered = Callable[..., Any]


def check_scorers(plan: Planned) -> None:
    """Raises `OptionError` for a plan whose scores a new token cannot have when it is computed, or that prunes nothing.

    Attention is received from later tokens, of which there are none yet.
    """
    if not isinstance(plan, PrunePlan):
        spec = plan.given.get("scorer") if isinstance(plan, Draft) else None  # several plans are refused before
        specs = [ScorerSpec.of(spec or "attention")]
    else:
        specs = [plan.scorer_of(i) for i, stage in enumerate(plan.stages) if stage.keep != 1]
        if not specs:
            raise OptionError(
                "Option 'decode' cuts the caches of pruned layers, and no stage of the plan prunes. Give a plan with a "
                "keep under 1, or leave 'decode' out."
            )
    if reading := sorted(s.name for s in specs if scorer_class(s.name).reads_attention(dict(s.options))):
        raise OptionError(
            f"Option 'decode' scores each new token when it is computed, and the scorer {reading[0]!r} needs the "
            "attention of tokens after it. Take a trained predictor ('mlp'), 'norm', or leave 'decode' out."
        )


def after_prompt(
    lowered: Lowered,
    found: Returned,
    protect: Protect,
    decode: Decode,
    before: Sequence[int] = (),
    *,
    dense: bool = False,
) -> Lowered:
    """The graph of a prompt, whose results `passes.scores.ReturnScores` added to: scores go beside the caches.

    Args:
        before: of a later turn, by stage the place among the inputs of a cache that it goes on from.
        dense: whether caches without scores are gone on from as they are.
    """

    def run(*args: Any) -> Any:
        carry_rows()
        known = [scores_of(args[at]) for at in before]
        if None in known and not dense:
            raise _without_scores()
        given = list(lowered(*args))
        results, added = given[: found.results], given[found.results :]
        rank, each = added[0], 4 if found.padded else 3
        for level, places in enumerate(found.caches if None not in known else ()):
            scores, protected, positions, *marks = added[1 + each * level : 1 + each * (level + 1)]
            kept = Scores(
                scores=scores.detach(),
                rank=rank.expand(len(scores), -1).gather(1, positions),
                filled=marks[0] if marks else torch.ones_like(positions, dtype=torch.bool),
                stays=protected > 0,
                seen=(rank[:, -1:] + 1).expand(len(scores), -1).clone(),
                protect=protect,
                slots=rank.shape[1],
            )
            earlier = known[level] if known else None
            _put(decode, results, places, kept if earlier is None else earlier.joined(kept))
        return tuple(results)

    return run


@dataclass(frozen=True)
class LaterCall:
    """What is known of a graph that goes on from a cache.

    Attributes:
        graph_module: with the hidden states [B, Q, D] at the plan's cuts behind its results.
        results: how many there were.
        sites: where the stages are.
        caches: by stage, of each of its keys and values the place among the inputs and among the results.
        protect: what the plan protects.
        mask, ids: places of the attention mask and the token ids among the inputs.
    """

    graph_module: GraphModule
    results: int
    sites: tuple[Site, ...]
    caches: tuple[tuple[tuple[int | None, int], ...], ...]
    protect: Protect
    mask: int | None
    ids: int | None


def later_call(gm: GraphModule, plan: Planned) -> LaterCall:
    """Find the plan's cuts in an ATen graph of one or more tokens that go on from a cache, or start one; edits it.

    Raises:
        PlanError, RefusalError, CaptureError: as for the prompt.
    """
    inputs = find_inputs(gm)
    blocks = find_blocks(gm, inputs, _CallSizes(gm, inputs))
    if not isinstance(plan, PrunePlan):
        plan = plan.completed(replace(PrunePlan.default(len(blocks)), protect=Protect(first=1, last=1)))
    width = int(fake_value(blocks[0].start).shape[-1])
    sites = place(plan, blocks, width)
    output = next(iter(gm.graph.find_nodes(op="output")))
    results: tuple[Any, ...] = tuple(torch.utils._pytree.tree_leaves(output.args))
    for site in sites:
        value = fake_value(site.cut)
        site.scorer.to(device=value.device, dtype=value.dtype).requires_grad_(False)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    caches = _caches(gm, sites, placeholders, results)
    output.args = ((*results, *(site.cut for site in sites)),)
    gm.recompile()
    mask, ids = inputs.attention_mask, inputs.token_ids
    return LaterCall(
        gm,
        len(results),
        tuple(sites),
        caches,
        plan.protect,
        None if mask is None else placeholders.index(mask),
        None if ids is None else placeholders.index(ids),
    )


class _CallSizes(Sizes):
    """The axes of a call's values by their shapes: what has as many rows and tokens as the call is [B, Q, D].

    Lengths cannot be told by replaying the graph at others, as a call of one token has none to change.
    """

    def __init__(self, gm: GraphModule, inputs: ModelInputs) -> None:
        values = {n: _without_data(fake_value(n)) for n in gm.graph.nodes}
        self.first = self.second = _Traced(values)  # type: ignore[assignment]  # what is read of a probe
        self._batch, self._tokens = (concrete(n, {}) for n in fake_value(inputs.tokens).shape[:2])
        self.one_row = False
        self._axes: dict[Node, tuple[Axis, ...] | None] = {}

    def axes(self, node: Node) -> tuple[Axis, ...] | None:
        value = fake_value(node)
        if not isinstance(value, Tensor):
            return None
        constant, row, sequence = Axis(AxisKind.CONST), Axis(AxisKind.BATCH), Axis(AxisKind.SEQ)
        if value.dim() == 4 and node.target in SOFTMAX:
            return row, constant, sequence, sequence
        leading = tuple(concrete(n, {}) for n in value.shape[:2])
        if value.dim() == 3 and leading == (self._batch, self._tokens):
            return row, sequence, constant
        return (constant,) * value.dim()

    def number(self, node: Node) -> Axis | None:
        value = fake_value(node)
        is_number = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        return Axis(AxisKind.CONST) if is_number else None


def _without_data(value: Any) -> Any:
    """At the sizes of the traced call: comparing open ones would fix them."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty([concrete(n, {}) for n in value.shape], dtype=value.dtype, device="meta")


@dataclass(frozen=True)
class _Traced:
    values: Mapping[Node, Any]


def _caches(
    gm: GraphModule, sites: Sequence[Site], placeholders: Sequence[Node], results: Sequence[Any]
) -> tuple[tuple[tuple[int | None, int], ...], ...]:
    """By stage, the keys and values that may be cut, as `passes.windows.note_whole` has it for the prompt: those of a
    window have a slot for each position in it, and so has the first layer of the whole text in a model with windows."""
    cuts = {site.cut: i + 1 for i, site in enumerate(sites)}
    level: dict[Node, int] = {}
    for node in gm.graph.nodes:
        level[node] = max((max(cuts.get(a, 0), level[a]) for a in node.all_input_nodes), default=0)
    joined = [(n, i) for i, n in enumerate(results) if isinstance(n, Node) and _appends(n)]
    windows = any(isinstance(n, Node) and cut_to_window(n) is not None for n in results)
    counted = sorted(n for n, _ in joined)[:2] if windows else []
    found: list[list[tuple[int | None, int]]] = [[] for _ in sites]
    for node, at in sorted(joined):
        if level[node] and node not in counted:
            past: Any = node.args[0]
            source = past[0] if isinstance(past[0], Node) and past[0].op == "placeholder" else None
            found[level[node] - 1].append((None if source is None else placeholders.index(source), at))
    return tuple(map(tuple, found))


def _appends(node: Node) -> bool:
    """Keys or values [B, H, K + Q, D]: ``cat([past, new], -2)``."""
    if node.target is not aten.cat.default or len(node.args) < 2 or node.args[1] not in (2, -2):
        return False
    return bool(fake_value(node).dim() == 4)


def after_later_call(lowered: Lowered, call: LaterCall, decode: Decode, *, dense: bool = False) -> Lowered:
    """The graph of `later_call`: its tokens get scores, and where it is time, the caches that it returns are cut.

    Args:
        dense: whether caches without scores are gone on from as they are.
    """
    reads = [[at for at, _ in pairs if at is not None] for pairs in call.caches]

    def run(*args: Any) -> Any:
        carry_rows()
        before = [[scores_of(args[at]) for at in places] for places in reads]
        if any(s is None for stage in before for s in stage):
            if not dense:
                raise _without_scores()
            return tuple(lowered(*args)[: call.results])
        given = list(lowered(*args))
        results, states = given[: call.results], given[call.results :]
        for site, hidden, pairs, known in zip(call.sites, states, call.caches, before, strict=True):
            if pairs:
                scores = _followed(call, site, hidden.detach(), known[0] if known else None, args)
                _put(decode, results, [at for _, at in pairs], scores)
        return tuple(results)

    return run


def with_empty_padding(lowered: Lowered, gm: GraphModule) -> Lowered:
    """The ATen graph of several tokens that go on from a cache: where the attention mask says that some are padding,
    their slots in the caches that it returns are empty. A shortened cache says by that alone what later tokens see."""
    if all(tokens is source for tokens, source in embedded(gm.graph, given_inputs(gm))):
        return lowered  # of embeddings, whose masks may say nothing of padding
    inputs = find_inputs(gm)
    if inputs.token_ids is None or _is_one(fake_value(inputs.tokens).shape[1]):
        return lowered
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    mask = next((i for i, n in enumerate(placeholders) if input_name(n) in MASK_NAMES), None)
    output = next(iter(gm.graph.find_nodes(op="output")))
    results: list[Any] = torch.utils._pytree.tree_leaves(output.args)
    places = [i for i, n in enumerate(results) if isinstance(n, Node) and _appends(n)]
    ids = placeholders.index(inputs.tokens)
    if mask is None or not places:
        return lowered

    def run(*args: Any) -> Any:
        given, tokens = list(lowered(*args)), args[ids].shape[1]
        own = args[mask][:, -tokens:] != 0
        if not bool(own.all()):
            for at in places:
                before, new = given[at][:, :, :-tokens], given[at][:, :, -tokens:]
                given[at] = torch.cat([before, new * own[:, None, :, None].to(new.dtype)], 2)
        return tuple(given)

    return run


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _without_scores() -> RefusalError:
    return RefusalError(
        "this call goes on from a cache whose tokens have no scores: another model or compilation filled it, or it was "
        "moved, cropped or rebuilt since. So it cannot be told which tokens the option 'decode' should cut.",
        hint="Start from the prompt with the model that was compiled with 'decode', or compile without it.",
    )


def _followed(call: LaterCall, site: Site, hidden: Tensor, known: Scores | None, args: Sequence[Any]) -> Scores:
    """A stage's scores with those of the call's tokens, whose states are ``hidden`` [B, Q, D]."""
    rows, tokens = hidden.shape[:2]
    mask = None if call.mask is None else args[call.mask]
    live = hidden.new_ones((rows, tokens), dtype=torch.bool) if mask is None else mask[:, -tokens:] != 0
    counted = live.to(torch.int64)
    seen = counted.new_zeros((rows, 1)) if known is None else known.seen
    total = seen + counted.sum(1, keepdim=True)
    ids = None if call.ids is None else args[call.ids]
    given = ScoreInputs(
        hidden=hidden,
        alive=None if mask is None else live,
        rank=seen + counted.cumsum(1) - 1,
        token_ids=ids,
        end=total - protected_last(total, call.protect, maximum=lambda a, b: a.clamp(min=b)),
    )
    with torch.no_grad():
        scores = as_scores(site.scorer(given))
    named = named_tokens(replace(call.protect, segment=None), ids, None, live)
    stays = torch.zeros_like(live) if named is None else named & live
    if known is None:  # a prompt of one token
        empty = scores.new_zeros((rows, 0))
        none = torch.zeros_like(empty, dtype=torch.bool)
        known = Scores(empty, empty.to(torch.int64), none, none, seen, call.protect, 0, -tokens)
        stays = live
    return known.followed_by(scores, live, stays)


def _put(decode: Decode, results: list[Any], places: Sequence[int], scores: Scores) -> None:
    """Scores beside the caches at ``places``, which are cut where it is time."""
    index = None
    if decode.every is not None and scores.since >= decode.every:
        assert decode.keep is not None
        scores = replace(scores, since=0)
        if (chosen := cut(scores, decode.keep)) is not None:
            scores, index = chosen
            if len(scores) >= scores.slots and not bool(scores.filled.all()):
                expect_empty_slots()  # as long as the row, so that its mask fits
    for at in places:
        if index is not None:
            results[at] = taken(results[at], index, scores.filled)
        keep_scores(results[at], scores)
