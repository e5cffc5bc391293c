"""Outputs that carry the sequence axis get it back at full length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.graph.head import behind_norms
from prunepass.graph.trace import Operand
from prunepass.passes.contract import Fault, Pass, is_ours, layout_faults
from prunepass.passes.fill import ONE_FOR_ALL, fill_behind_norms, filled, filling
from prunepass.passes.merge import merges, restore_hosted
from prunepass.passes.propagation import result_faults
from prunepass.passes.state import Rewrite, Site
from prunepass.passes.take import take
from prunepass.scorers.lens import Lens

__all__ = ["Restore", "restore_gathered", "restore_masked"]


def restore_gathered(
    states: list[Tensor],
    positions: list[Tensor],
    live: Tensor | None = None,
    alive: Tensor | None = None,
    restore: str = "last",
    held: list[Tensor] | None = None,
) -> Tensor:
    """[B, S, D] from the states at each cut, or what a lens made of them.

    Each token gets the last state it had. With ``restore`` "zeros" or "mean", tokens that did not live to the end get
    zeros, or the mean of those that did. A map of where to read is made on integers, then all rows are read at once.

    Args:
        states: ``states[0]`` is [B, S, D], the stream at the first cut; ``states[j]`` [B, K_j, D] that at the next cut,
            or at the end.
        positions: ``positions[j - 1]`` [B, K_j] int64 says where the slots of ``states[j]`` stand in the original row;
            surplus slots at a padding token.
        live: [B, S] bool, False at padding; None where there is none.
        alive: [B, K] bool for the last state, False at surplus slots; None where there are none. For "mean" alone.
        held: [B, K_j] bool for each of ``positions``, False at surplus slots; needed where a row without padding may
            have some, as they then stand at a token.

    Returns:
        In the dtype of the last state.
    """
    length = states[0].shape[1]
    last = states[-1]
    before = torch.arange(length, device=last.device)[None, :].expand(last.shape[0], length)
    offset: Any = length
    if restore in ONE_FOR_ALL:
        states, positions = [filling(last, alive, restore), last], positions[-1:]
        held = None if held is None else held[-1:]
        before, offset = torch.zeros_like(before), 1
    at = torch.cat(positions, dim=1)
    # broadcast by arithmetic: runtimes have a dozen operators on sizes for an expansion
    rows = at * 0 + torch.arange(at.shape[1], device=at.device)[None, :] + offset
    if held is not None:
        rows = torch.where(torch.cat(held, dim=1), rows, 0)
    # a token stands in every stage that it reached, the last of which is the furthest behind
    where = before.scatter_reduce(1, at, rows, "amax")
    if live is not None:  # surplus slots say that they stand at padding
        where = torch.where(live, where, before)
    return take(torch.cat([s.to(last.dtype) for s in states], dim=1), where, 1, 0)


def restore_masked(states: list[Tensor], alive: list[Tensor], restore: str = "last") -> Tensor:
    """The same from full-length states: ``alive[j]`` [B, S] bool says which tokens reached ``states[j + 1]``."""
    last = states[-1]
    if restore in ONE_FOR_ALL:
        return filled(last, alive[-1], restore)
    out = states[0].to(last.dtype)
    for state, live in zip(states[1:], alive, strict=True):
        out = torch.where(live[..., None], state.to(last.dtype), out)
    return out


def restore_faded(states: list[Tensor], degree: list[Tensor], restore: str = "last") -> Tensor:
    """`restore_masked` with degrees in [0, 1] for ``alive``: states are mixed, and the choice has a gradient."""
    last = states[-1]
    if restore in ONE_FOR_ALL:
        return filled(last, degree[-1], restore)
    out = states[0].to(last.dtype)
    for state, part in zip(states[1:], degree, strict=True):
        weight = part[..., None].to(last.dtype)
        out = weight * state.to(last.dtype) + (1 - weight) * out
    return out


@dataclass(frozen=True)
class Restore(Pass):
    """``head(h[kept])`` -> ``head(restore(h[kept]))`` at the end of the stream, and for each other output of a hidden
    state.

    Nothing is added where the head reads protected tokens only.
    """

    name = "restore"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for site in state.sites:
            if site.kept is None or (state.mode == "gather" and site.narrowed is None):
                yield Fault(f"The stage {site.place} has no effect yet.", site.cut)

    def run(self, state: Rewrite) -> int:
        """Returns the number of values put back."""
        count = 0
        end = state.stream_end
        if not state.reads_protected:
            users = [u for u in end.users if state.level.get(u, 0) == 0 and not self._ours(u)]
            carried = behind_norms(state.graph, end, state.sizes) - {end}
            put_back = self._at(state, end, len(state.sites), users, with_lens=state.plan.restore == "lens")
            count += put_back
            if put_back and state.plan.restore in ONE_FOR_ALL:
                count += fill_behind_norms(state, carried, self.name)
        for node, users in state.taps.items():
            count += self._at(state, node, state.level.get(node, 0), users)
        output = next(iter(state.graph.find_nodes(op="output")))
        for node in list(output.all_input_nodes):
            level = state.level.get(node, 0)
            if level and node is not end and node not in state.cached and state.sizes.follows_length(node):
                count += self._at(state, node, level, [output])
        return count

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for old, new in zip(state.outputs, state.results(), strict=True):
            if not isinstance(old, Node) or old in state.cached or old in state.whole:
                continue
            level = state.level.get(old, 0) or (len(state.sites) if old is state.stream_end else 0)
            if level and state.sizes.follows_length(old) and new is old:
                yield Fault("The model returns it, and it is as short as its layer.", old)
            elif isinstance(new, Node) and is_ours(new):
                yield from layout_faults(state, new, "restored states", ("B", "S", *state.value(old).shape[2:]))
        for user in state.stream_end.users if not state.reads_protected else ():
            if not is_ours(user) and user.op != "output" and state.level.get(user, 0) == 0:
                yield Fault("It reads the pruned stream, which was not restored.", user)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return result_faults(state)

    def _ours(self, user: Node) -> bool:
        return "prunepass" in user.meta

    def _at(self, rewrite: Rewrite, node: Node, level: int, users: list[Node], with_lens: bool = False) -> int:
        """Replace ``node``, at ``level``, by its full-length form in ``users``."""
        sites = rewrite.sites[:level]
        if not users or not sites:
            return 0
        lenses = [_lens(site) for site in sites] if with_lens else []
        latest = sites[-1]
        state = latest.narrowed if node is latest.cut and latest.narrowed is not None else node
        restore = rewrite.plan.restore
        width = rewrite.value(node).shape[-1]
        gathers = rewrite.mode == "gather"
        states = [
            Operand(n, ("B", "S" if i == 0 or not gathers else f"K{i}", width), rewrite.value(o).dtype, rewrite.device)
            for i, (n, o) in enumerate([*((s.cut, s.cut) for s in sites), (state, node)])
        ]
        kept = [s.kept for s in sites if s.kept is not None]
        if restore == "last" and merges(rewrite):
            return self._hosted(rewrite, node, sites, states, users)
        alive = [k.alive for k in kept if k.alive is not None]
        whole = []
        held: list[Node] = []
        if gathers and alive:
            assert rewrite.live is not None
            assert rewrite.live.alive is not None
            held = alive if rewrite.live.leaving is not None else []
            whole, alive = [rewrite.live.alive], alive[-1:]
        positions = [k.positions for k in kept if k.positions is not None]
        degrees = [k.degree for k in kept if k.degree is not None]
        alive = degrees or alive  # a trained gate stands at all stages or at none
        live_dtype = torch.float32 if degrees else torch.bool
        weights = [node for site in sites[: len(lenses)] for node in site.lens.values()]
        operands = [
            *states,
            *(rewrite.operand(p, "B", f"K{i + 1}", dtype=torch.int64) for i, p in enumerate(positions)),
            *(rewrite.operand(a, "B", "S", dtype=torch.bool) for a in whole),
            *(rewrite.operand(a, "B", f"K{len(sites)}" if gathers else "S", dtype=live_dtype) for a in alive),
            *(rewrite.operand(a, "B", f"K{i + 1}", dtype=torch.bool) for i, a in enumerate(held)),
            *(rewrite.operands[node] for node in weights),
        ]

        def build(*values: Tensor) -> Tensor:
            given = iter(values)
            xs, at = list(islice(given, len(states))), list(islice(given, len(positions)))
            dense, live = list(islice(given, len(whole))), list(islice(given, len(alive)))
            slots = list(islice(given, len(held))) or None
            for i, lens in enumerate(lenses):
                parameters = dict(zip(sites[i].lens, islice(given, len(sites[i].lens)), strict=True))
                xs[i] = torch.func.functional_call(lens, parameters, (xs[i],))
            if gathers:
                first, last = next(iter(dense), None), next(iter(live), None)
                return restore_gathered(xs, at, first, last, restore, slots)
            return restore_faded(xs, live, restore) if degrees else restore_masked(xs, live, restore)

        ranks = tuple(lens.rank for lens in lenses)
        key = ("restore", gathers, restore, len(sites), bool(alive), bool(held), bool(degrees), ranks)
        at = max([state, *positions, *whole, *alive, *held])
        with rewrite.graph.inserting_after(at):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (state,))
        with rewrite.graph.inserting_before(anchor):
            out = rewrite.inline(build, operands, stage=latest.index, role=self.name, key=key)
        rewrite.graph.erase_node(anchor)
        for user in users:
            user.replace_input_with(node, out)
        return 1

    def _hosted(self, rewrite: Rewrite, node: Node, sites: list[Site], states: list[Operand], users: list[Node]) -> int:
        """In a plan that merges: each token gets its host's last state."""
        hosts = [
            rewrite.operand(s.merged.host, "B", state.shape[1], dtype=torch.int64)
            for s, state in zip(sites, states[:-1], strict=True)
            if s.merged is not None
        ]

        complete = all(s.merged is not None and s.merged.complete for s in sites)

        def build(*values: Tensor) -> Tensor:
            return restore_hosted(list(values[: len(states)]), list(values[len(states) :]), complete)

        operands = [*states, *hosts]
        with rewrite.graph.inserting_after(max(o.node for o in operands)):
            anchor = rewrite.graph.create_node("call_function", torch.ops.aten.alias.default, (states[-1].node,))
        key = ("restore hosted", rewrite.mode, len(sites), complete)
        with rewrite.graph.inserting_before(anchor):
            out = rewrite.inline(build, operands, stage=sites[-1].index, role=self.name, key=key)
        rewrite.graph.erase_node(anchor)
        for user in users:
            user.replace_input_with(node, out)
        return 1


def _lens(site: Site) -> Lens:
    """The stage's lens. Raises `WeightsError` where it has none."""
    return site.scorer.lens if site.scorer.lens is not None else Lens.load({}, 1, site.place)
