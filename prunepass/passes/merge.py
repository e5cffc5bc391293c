"""Tokens that leave are averaged into kept ones: plain torch functions, and what `narrow`, `hide` and `restore` need.

Each leaving token goes to its *host*, the kept token whose state, or whatever the scorer compares tokens by
(`Scorer.hosts`), is nearest by cosine. A state stands for a number of
original tokens, its *size*; the host's new state is the mean of the states that meet in it, weighted by their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.trace import Extent, Operand
from prunepass.passes.later import looks_back
from prunepass.passes.state import Merged, Rewrite, Site, latest
from prunepass.passes.take import take
from prunepass.plan.counts import protected_last

__all__ = ["insert_merge", "merge", "merges", "restore_hosted", "shrink"]

#: stands for the cosine of two tokens that cannot meet; any below -1
_NEVER = -2.0
#: two cosines that differ by less are equal: some units in the last place of a sum over a hidden state
_ROUNDING, _ROUNDING_64 = 2.0**-19, 2.0**-44


def merge(
    hidden: Tensor,
    index: Tensor,
    sizes: Tensor | None,
    alive: Tensor | None = None,
    kept: Tensor | None = None,
    later_only: bool = False,
    protected: Tensor | None = None,
    vectors: Tensor | None = None,
    levels: Tensor | None = None,
    gone: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out[b, k] = sum_t A[b, k, t] m[b, t] h[b, t] / sum_t A[b, k, t] m[b, t]``, with A the 0/1 assignment.

    A protected token is nobody's host: a class token, or a question, keeps a state of its own. Where no kept token may
    be a host (``later_only``, and none is later; all are protected), the token is dropped. Of hosts at equal cosine the
    earlier one is taken.

    Args:
        hidden: [B, T, D] states.
        index: [B, K] int64, the slots that stay, ascending.
        sizes: [B, T] floating, how many original tokens each state stands for; None where each is one.
        alive: [B, T] bool, False at slots that hold no token: they meet nothing. None where all hold one.
        kept: [B, K] bool, False at surplus slots; None where there are none.
        later_only: whether a host must stand behind the token, so that in a causal model nothing sees its future.
        protected: [B, T] int64, not 0 at protected tokens; None where there are none.
        vectors, levels: see `scorers.Hosts`.
        gone: T - K, where that is a constant above 0 and all slots hold tokens (``alive`` and ``kept`` are None): the
            same then takes [B, K, T - K] comparisons in place of [B, K, T].

    Returns:
        The states [B, K, D], in the dtype of ``hidden``; the sizes [B, K]; and for each slot of the T its place among
        the K, its own or its host's: [B, T] int64, -1 for what was dropped.
    """
    if gone is not None:
        return _merge_fixed(hidden, index, sizes, gone, later_only, protected, vectors, levels)
    states = _finite(hidden, alive)
    own, stays = _own(hidden, index, kept)
    leaves = ~stays if alive is None else alive & ~stays
    unit = _unit(states if vectors is None else _finite(vectors, alive))
    cosine = take(unit, index, 1, 0) @ unit.transpose(1, 2)
    slots = torch.arange(hidden.shape[1], device=hidden.device)[None, :]
    possible = leaves[:, None, :]
    if kept is not None:
        possible = possible & kept[:, :, None]
    allowed = _allowed(index, slots, slots, later_only, protected, levels, alive)
    if allowed is not None:
        possible = possible & allowed
    hosted = _first_best(torch.where(possible, cosine, _NEVER))
    assigned = own | hosted
    weights = assigned.to(states.dtype)
    if sizes is not None:
        weights = weights * sizes[:, None, :]
    size = weights.sum(dim=2)
    merged = ((weights @ states) / size[..., None]).to(hidden.dtype)
    return merged, size, _hosts(own if kept is None else own & kept[:, :, None], hosted)


def _merge_fixed(
    hidden: Tensor,
    index: Tensor,
    sizes: Tensor | None,
    count: int,
    later_only: bool,
    protected: Tensor | None,
    vectors: Tensor | None,
    levels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` of rows that all have T tokens and keep K of them: the ``count`` = T - K others are taken out first."""
    slots = torch.arange(hidden.shape[1], device=hidden.device)[None, :]
    gone = _complement(index, count)
    states = _finite(hidden, None)
    unit = _unit(states if vectors is None else _finite(vectors, None))
    cosine = take(unit, index, 1, 0) @ take(unit, gone, 1, 0).transpose(1, 2)
    allowed = _allowed(index, gone, slots, later_only, protected, levels, None)
    hosted = _first_best(cosine if allowed is None else torch.where(allowed, cosine, _NEVER))
    weights = hosted.to(states.dtype)
    if sizes is not None:
        weights = weights * sizes.gather(1, gone)[:, None, :]
    came = weights @ take(states, gone, 1, 0)
    own = take(states, index, 1, 0)
    if sizes is None:
        size = weights.sum(dim=2) + 1
    else:
        before = sizes.gather(1, index)
        size = weights.sum(dim=2) + before
        own = own * before[..., None]
    merged = ((own + came) / size[..., None]).to(hidden.dtype)
    # how many left before a slot says where it is among those that stay, and which of those that left it is
    earlier = (gone[:, :, None] < slots[:, None, :]).to(torch.int64).sum(dim=1)
    which = earlier.clamp(max=count - 1)
    host = torch.where(gone.gather(1, which) == slots, _hosts(hosted, None).gather(1, which), slots - earlier)
    return merged, size, host


def _complement(index: Tensor, count: int) -> Tensor:
    """[B, count] int64: the slots that ``index`` [B, K], ascending, leaves out, ascending."""
    places = torch.arange(index.shape[1], device=index.device)[None, :]
    missing = torch.arange(count, device=index.device)
    # index[k] - k is how many are left out before it; those with at most j stand before the j-th that is left out
    before = (index - places)[:, :, None] <= missing[None, None, :]
    return before.to(torch.int64).sum(dim=1) + missing[None, :]


def _allowed(
    index: Tensor,
    leaving: Tensor,
    slots: Tensor,
    later_only: bool,
    protected: Tensor | None,
    levels: Tensor | None,
    alive: Tensor | None,
) -> Tensor | None:
    """[B, K, L] bool, or [B, K, 1]: whether a token that stays may be the host of one at ``leaving`` [B, L] or [1, T];
    None where all may. ``slots`` [1, T] are all; where ``leaving`` is ``slots``, nothing is looked up."""
    found = None
    if protected is not None:
        found = (protected.gather(1, index) == 0)[:, :, None]
    if levels is not None:
        there = levels if alive is None else torch.where(alive, levels, -1)
        highest = there == there.amax(dim=1, keepdim=True)
        own = levels
        if leaving is not slots:
            own, highest = levels.gather(1, leaving), highest.gather(1, leaving)
        higher = levels.gather(1, index)[:, :, None] > own[:, None, :]
        other = higher | highest[:, None, :]
        found = other if found is None else found & other
    if later_only:
        later = index[:, :, None] > leaving[:, None, :]
        found = later if found is None else found & later
    return found


def _unit(values: Tensor) -> Tensor:
    """Each of the vectors, one long."""
    norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    unit: Tensor = values / norms.clamp(min=torch.finfo(values.dtype).tiny)
    return unit


def _finite(values: Tensor, alive: Tensor | None) -> Tensor:
    """In at least float32, zero where nothing is alive: an assignment of 0 would not keep out what is not finite."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide if alive is None else torch.where(alive[..., None], wide, 0.0)


def shrink(
    hidden: Tensor, index: Tensor, sizes: Tensor | None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a stage that drops, after or before one that merges: states and sizes are picked."""
    own, _ = _own(hidden, index, kept)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    left = torch.ones_like(index, dtype=dtype) if sizes is None else sizes.gather(1, index)
    return take(hidden, index, 1, 0), left, _hosts(own if kept is None else own & kept[:, :, None], None)


def _own(hidden: Tensor, index: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, K, T] bool, each slot that stays at its place; and [B, T] bool, the tokens that stay."""
    slots = torch.arange(hidden.shape[1], device=hidden.device)
    own = index[:, :, None] == slots[None, None, :]
    stays = own if kept is None else own & kept[:, :, None]
    return own, stays.to(torch.int64).sum(dim=1) != 0


def _first_best(cosine: Tensor) -> Tensor:
    """[B, K, T] bool, true at most once for each T: at the first of the largest over K, if that is a cosine at all.

    Equal states, such as those of one word in two places before the first block, have equal cosines. A matrix product
    may give them with other last digits, so what is nearer than rounding counts as equal. The value to compare with is
    read by index: a runtime may reduce in another precision than it compares.
    """
    places = torch.arange(cosine.shape[1], device=cosine.device)[None, :, None]
    best = cosine.argmax(dim=1, keepdim=True)
    value = cosine.gather(1, best) - (_ROUNDING_64 if cosine.dtype == torch.float64 else _ROUNDING)
    first = torch.where(cosine >= value, places, cosine.shape[1]).amin(dim=1, keepdim=True)
    # asked this way round, NaN counts as a cosine: each token that leaves a broken image has a host in it, too
    return (places == torch.minimum(first, best)) & ~(value <= _NEVER / 2 - 0.5)


def _hosts(own: Tensor, hosted: Tensor | None) -> Tensor:
    places = torch.arange(own.shape[1], device=own.device)[None, :, None]
    found = own if hosted is None else own | hosted
    return torch.where(found, places, -1).amax(dim=1)


def restore_hosted(states: list[Tensor], hosts: list[Tensor], complete: bool = False) -> Tensor:
    """[B, S, D]: each token gets the last state of its host, and its own last one where it was dropped.

    Args:
        states: ``states[0]`` is [B, S, D], the stream at the first cut; ``states[j]`` [B, K_j, D] that at the next cut,
            or at the end.
        hosts: ``hosts[j - 1]`` [B, K_(j-1)] int64, as by `merge`, says at which slot of ``states[j]`` each slot of
            ``states[j - 1]`` is.
        complete: whether no token was dropped: then all of them have a last state.

    Returns:
        In the dtype of the last state.
    """
    first, last = states[0], states[-1]
    if complete:
        found = hosts[0]
        for host in hosts[1:]:
            found = host.gather(1, found)
        return take(last, found, 1, 0)
    slots = torch.arange(first.shape[1], device=last.device)[None, :].expand(first.shape[0], first.shape[1])
    where, at, offset = slots, slots, first.shape[1]
    for host, state in zip(hosts, states[1:], strict=True):
        at = torch.where(at >= 0, host.gather(1, at.clamp(min=0)), -1)
        where = torch.where(at >= 0, at + offset, where)
        offset = offset + state.shape[1]
    return take(torch.cat([s.to(last.dtype) for s in states], dim=1), where, 1, 0)


def merges(rewrite: Rewrite) -> bool:
    """Whether any stage merges: then all of them say where tokens went."""
    return any(site.stage.leave == "merge" for site in rewrite.sites)


def insert_merge(rewrite: Rewrite, site: Site, role: str) -> Node:
    """Put `merge`, or `shrink`, into the graph; sets ``site.merged``.

    In mask mode all slots stay where they are: those of tokens that leave keep their states, and are hidden as keys.

    Returns:
        The node of the states below the cut.
    """
    kept, before, live = site.kept, rewrite.kept_before(site), rewrite.live
    assert kept is not None
    assert live is not None
    gathers, does_merge = rewrite.mode == "gather", site.stage.leave == "merge"
    hidden = rewrite.value(site.cut)
    slots, left = ("S" if before is None else "T", "K") if gathers else ("S", "S")
    gone = _constant_difference(rewrite, site) if gathers and does_merge else None
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    at = rewrite.sites.index(site)
    earlier = rewrite.sites[at - 1].merged if at else None
    given: dict[str, Operand] = {}

    def note(name: str, node: Node | None, dtype: torch.dtype, *shape: Extent) -> None:
        if node is not None:
            given[name] = rewrite.operand(node, "B", *shape, dtype=dtype)

    note("index", kept.index, torch.int64, left)
    note("sizes", earlier.sizes if earlier else None, wide, slots)
    note("alive", before.alive if before is not None else live.alive, torch.bool, slots)
    note("kept", kept.alive, torch.bool, left)
    if does_merge:
        protected = rewrite.at_slots(live.protected, before) if gathers else live.protected
        note("protected", protected, torch.int64, slots)
        if site.vectors is not None:
            layout = site.vectors.meta["layout"]
            note("vectors", site.vectors, layout.dtype, slots, layout.shape[-1][0])
        note("levels", site.levels, torch.int64, slots)
    cut = Operand(site.cut, ("B", slots, hidden.shape[-1]), hidden.dtype, rewrite.device)
    later_only = does_merge and looks_back(rewrite)

    def build(hidden: Tensor, *rest: Tensor) -> Any:
        named: dict[str, Any] = dict(zip(given, rest, strict=True))
        index = named.pop("index", None)
        if index is None:
            every = torch.arange(hidden.shape[1], device=hidden.device)
            index = every[None, :].expand(hidden.shape[0], hidden.shape[1])
        sizes = named.pop("sizes", None)
        if does_merge:
            return merge(hidden, index, sizes, later_only=later_only, gone=gone, **named)
        return shrink(hidden, index, sizes, named.get("kept"))

    nodes = [cut.node, *(o.node for o in given.values())]
    if kept.positions is not None:
        nodes.append(kept.positions)
    with rewrite.graph.inserting_after(latest(*nodes)):
        anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (site.cut,))
    key = ("merge", does_merge, later_only, gathers, gone, tuple(given))
    with rewrite.graph.inserting_before(anchor):
        states, sizes, host = rewrite.inline(build, [cut, *given.values()], stage=site.index, role=role, key=key)
    rewrite.graph.erase_node(anchor)
    site.merged = Merged(sizes, host, gone is not None and not later_only and _all_have_hosts(rewrite, site))
    assert isinstance(states, Node)
    return states


def _constant_difference(rewrite: Rewrite, site: Site) -> int | None:
    """How many tokens leave each row here, where that is a constant above 0: the model fixes the length, and no row has
    a slot that holds no token."""
    before, kept = rewrite.kept_before(site), site.kept
    assert kept is not None
    assert rewrite.live is not None
    alive = before.alive if before is not None else rewrite.live.alive
    if alive is not None or kept.alive is not None:
        return None
    at = rewrite.sites.index(site)
    reach, left = (rewrite.constant_slots(s) for s in (rewrite.sites[at - 1] if at else None, site))
    return reach - left if reach is not None and left is not None and reach > left else None


def _all_have_hosts(rewrite: Rewrite, site: Site) -> bool:
    """Whether each token that leaves is sure to find a host, where their number is a constant: more stay than places
    are protected, and the scorer's levels, if it has any, rule out no last one."""
    length, left = rewrite.inputs.fixed_length, rewrite.constant_slots(site)
    assert length is not None
    assert left is not None
    protect = rewrite.plan.protect
    held = protect.first + protected_last(length, protect)
    by_place = not (protect.token_ids or protect.only_ids or protect.segment)
    return by_place and left > held and (site.levels is None or site.scorer.has_hosts_for_all)
