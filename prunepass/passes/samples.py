"""Contracts of the choice of tokens, held against a few rows of random numbers: the nodes in the graph are run as they
are, and what they answer is compared with the words of the plan, counted in plain Python.

Only nodes between the inputs and the choice are run, with random scores; no weight of the model is read. On the meta
device there is nothing to run on, and nothing is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._python_dispatch import _disable_current_modes

from prunepass.graph.inputs import fake_value
from prunepass.passes.contract import Fault, is_ours
from prunepass.passes.segments import types_of
from prunepass.passes.state import Rewrite, Site
from prunepass.plan import kept_count, protected_last, share_of
from prunepass.plan.levels import LEVEL

__all__ = ["kept_faults", "live_faults", "merge_faults", "sample_inputs", "slot_faults", "width_faults"]

ROWS, LENGTH = 3, 13


def live_faults(state: Rewrite) -> Iterator[Fault]:
    """Live tokens, their places, counts and protection, on random masks and ids."""
    live = state.live
    assert live is not None
    if state.device.type == "meta" or state.inputs.prompt is not None:
        return  # or: how many slots a prompt's stages leave follows from its own ids, not from random ones
    given = sample_inputs(state)
    state.sample.update(given)
    nodes = [live.alive, live.rank, live.count, live.padding, live.protected, live.end]
    _run(state, [n for n in nodes if n is not None])
    alive, _ = _alive(state)
    mask = state.inputs.attention_mask
    if mask is not None and not torch.equal(alive, given[mask] != 0):
        yield Fault("Other tokens are live than the attention mask says.", live.alive)
    for row, here in enumerate(alive):
        count = int(here.sum())
        if live.count is not None and int(_value(state, live.count)[row]) != count:
            yield Fault(f"It counts {int(_value(state, live.count)[row])} of {count} live tokens.", live.count)
        if _value(state, live.rank)[row][here].tolist() != list(range(count)):
            yield Fault("It does not give each live token its place among them.", live.rank)
        padding = None if live.padding is None else int(_value(state, live.padding)[row])
        if padding is not None and count < len(here) and bool(here[padding]):
            yield Fault("The position that stands for padding holds a live token.", live.padding)
        end = count - protected_last(count, state.plan.protect)
        if int(_value(state, live.end)[row]) != end:
            yield Fault(f"The protected end begins at {int(_value(state, live.end)[row])} in place of {end}.", live.end)
        by_place = [i < state.plan.protect.first or i >= end for i in range(count)]
        if (_value(state, live.protected)[row][here] == 2).tolist() != by_place:
            yield Fault("Other tokens are protected by their position than the plan says.", live.protected)


def width_faults(state: Rewrite) -> Iterator[Fault]:
    """How many slots and tokens each stage keeps at each level, the last one running on to `kept_faults`."""
    assert state.live is not None
    assert state.levels is not None
    if state.live.rank not in state.sample:
        return  # nothing could be run
    chooses = next(node for node in state.placeholders if node.target == LEVEL)
    tables = [n for n in state.graph.find_nodes(op="get_attr") if is_ours(n) and hasattr(state.gm, str(n.target))]
    known = state.sample | {n: getattr(state.gm, str(n.target)) for n in tables}
    alive, _ = _alive(state)
    for number, shares in enumerate(state.levels.shares()):
        state.sample = known | {chooses: torch.tensor([number], device=state.device)}
        _run(state, [n for site in state.sites for n in (site.width, site.end) if n is not None])
        for site in state.sites:
            width = kept_count(alive.shape[1], shares[site.index], state.plan.protect)
            if site.width is not None and state.sample[site.width] != width:
                yield Fault(f"At level {number} it is {state.sample[site.width]} in place of {width}.", site.width)
            counts = [kept_count(int(here.sum()), shares[site.index], state.plan.protect) for here in alive]
            if site.end is not None and (_value(state, site.end)[:, 0] + 1).tolist() != counts:
                yield Fault(f"At level {number} rows keep other numbers of tokens than the plan says.", site.end)


def slot_faults(state: Rewrite) -> Iterator[Fault]:
    """How many slots each stage leaves where some tokens may leave, for rows of given counts."""
    live = state.live
    assert live is not None
    if state.device.type == "meta" or live.count is None or live.leaving is None:
        return
    counts = {live.count: [9, 13, 5], live.leaving: [4, 8, 5]}
    state.sample.update({node: torch.tensor(n, device=state.device)[:, None] for node, n in counts.items()})
    _run(state, [site.width for site in state.sites if site.width is not None])
    for site in state.sites:
        width = max(n - c + share_of(c, site.stage.keep) for n, c in zip(*counts.values(), strict=True))
        if site.width is not None and state.sample[site.width] != width:
            yield Fault(f"Of the sample's rows it is {state.sample[site.width]} in place of {width}.", site.width)


def _share(state: Rewrite, site: Site) -> Fraction:
    """What a stage keeps in the sample; of several levels that of the last one."""
    return site.stage.keep if state.levels is None else state.levels.shares()[-1][site.index]


def kept_faults(state: Rewrite, site: Site) -> Iterator[Fault]:
    """Order, counts and positions of what a stage keeps, and that those kept are the best, on random scores."""
    kept, before, live = site.kept, state.kept_before(site), state.live
    assert kept is not None
    assert live is not None
    assert site.scores is not None
    if live.rank not in state.sample:
        return  # nothing could be run
    alive, positions = _alive(state)
    slots = positions if before is None or before.positions is None else _value(state, before.positions)
    generator = torch.Generator().manual_seed(site.index)
    scores = torch.randint(0, 6, tuple(slots.shape), generator=generator).to(state.score_dtype(site))
    state.sample[site.scores] = scores.to(state.device)
    _run(state, [n for n in (site.width, kept.index, kept.positions, kept.alive) if n is not None])
    length = alive.shape[1]
    if state.mode != "gather":
        yield from _budget_faults(state, site, alive, _value(state, kept.alive))
        return
    index, at = _value(state, kept.index), _value(state, kept.positions)
    width = kept_count(length, _share(state, site), state.plan.protect)
    if tuple(index.shape) != (len(alive), width):
        yield Fault(f"Of {length} tokens {index.shape[1]} slots are kept in place of {width}.", kept.index)
        return
    if width and not bool(((index >= 0) & (index < slots.shape[1])).all()):
        yield Fault("An index points past the slots that reached the stage.", kept.index)
        return
    if not bool((index.diff(dim=1) > 0).all()):
        yield Fault("The indices do not ascend along each row.", kept.index)
    full = torch.ones_like(index, dtype=torch.bool) if kept.alive is None else _value(state, kept.alive)
    if not torch.equal(at[full], slots.gather(1, index)[full]):
        yield Fault("Kept tokens have other positions than they had.", kept.positions)
        return
    marks = torch.zeros(len(alive), length + 1, dtype=torch.int64, device=at.device)
    marks = marks.scatter_add(1, torch.where(full, at, length), torch.ones_like(at))[:, :length]
    if int(marks.max()) > 1:
        yield Fault("A token is kept twice.", kept.positions)
    yield from _budget_faults(state, site, alive, marks > 0)


def merge_faults(state: Rewrite, site: Site) -> Iterator[Fault]:
    """Where tokens went at a stage, and how many each state stands for now, on random hidden states."""
    merged, kept, before = site.merged, site.kept, state.kept_before(site)
    assert merged is not None
    assert kept is not None
    if site.scores not in state.sample or state.mode != "gather":
        return  # nothing could be run, or every slot stays where it is
    index, hidden = _value(state, kept.index), state.value(site.cut)
    earlier = state.sites[state.sites.index(site) - 1].merged if before is not None else None
    here = _alive(state)[0] if before is None else None if before.alive is None else _value(state, before.alive)
    slots = _value(state, site.scores).shape
    generator = torch.Generator().manual_seed(site.index)
    states = torch.randn(*slots, int(hidden.shape[-1]), generator=generator)
    state.sample[site.cut] = states.to(device=state.device, dtype=hidden.dtype)
    if site.vectors is not None:  # which the model's weights go into
        width = site.vectors.meta["layout"].shape[-1][0]
        state.sample[site.vectors] = torch.randn(*slots, width, generator=generator).to(states.device, hidden.dtype)
    if site.levels is not None:
        levels = torch.randint(0, 3, tuple(slots), generator=generator)
        state.sample[site.levels] = levels.to(states.device)
    _run(state, [merged.sizes, merged.host])
    host, sizes = _value(state, merged.host), _value(state, merged.sizes)
    full = torch.ones_like(index, dtype=torch.bool) if kept.alive is None else _value(state, kept.alive)
    if not bool(((host >= -1) & (host < index.shape[1])).all()):
        yield Fault("A token went to a slot that there is not.", merged.host)
        return
    places = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    if not torch.equal(host.gather(1, index)[full], places[full]):
        yield Fault("A token that stays went elsewhere.", merged.host)
    counts = torch.ones(slots, dtype=sizes.dtype, device=sizes.device)
    counts = counts if earlier is None else _value(state, earlier.sizes)
    counts = torch.where((host >= 0) & (True if here is None else here), counts, 0)
    wanted = torch.zeros_like(sizes).scatter_add(1, host.clamp(min=0), counts)
    if not torch.equal(sizes[full], wanted[full]):
        yield Fault("A state stands for another number of tokens than have met in it.", merged.sizes)


def _budget_faults(state: Rewrite, site: Site, alive: Tensor, kept: Tensor) -> Iterator[Fault]:
    """Each row keeps live tokens only, as many as the plan says, and all those protected by position."""
    protect, live = state.plan.protect, state.live
    assert live is not None
    assert site.kept is not None
    node = site.kept.alive if site.kept.index is None else site.kept.index
    protected = _value(state, live.protected) == 2
    for row, (here, chosen) in enumerate(zip(alive, kept, strict=True)):
        budget = kept_count(int(here.sum()), _share(state, site), protect)
        if bool((chosen & ~here).any()):
            yield Fault("A token that is not live is kept.", node)
        if int(chosen.sum()) != budget:
            yield Fault(f"A row of {int(here.sum())} tokens keeps {int(chosen.sum())} in place of {budget}.", node)
        if bool((here & protected[row] & ~chosen).any()):
            yield Fault("A token that is protected by its position is not kept.", node)


def sample_inputs(state: Rewrite, *, padded: bool = True) -> dict[Node, Tensor]:
    """Random tokens; with ``padded`` masks with padding on the right, on the left, and holes."""
    generator = torch.Generator().manual_seed(0)
    inputs, device = state.inputs, state.device
    rows = 1 if state.sizes.one_row else ROWS
    tokens = fake_value(inputs.tokens)
    ids = torch.randint(0, 9, (rows, LENGTH), generator=generator)
    for token_id in state.plan.protect.token_ids:
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.1, token_id, ids)
    if inputs.token_ids is None:
        ids = torch.rand(rows, LENGTH, *map(int, tokens.shape[2:]), generator=generator)
    given = {inputs.tokens: ids.to(device=device, dtype=tokens.dtype)}
    if (types := types_of(inputs)) is not None:
        pairs = torch.randint(0, 2, (rows, LENGTH), generator=generator)
        given[types] = pairs.to(device=device, dtype=fake_value(types).dtype)
    if inputs.attention_mask is not None:
        mask = torch.ones(rows, LENGTH)
        for row, dead in zip(mask, (slice(9, None), slice(0, 4), slice(2, 9, 3)), strict=False):
            row[dead] = 0 if padded else 1
        given[inputs.attention_mask] = mask.to(device=device, dtype=fake_value(inputs.attention_mask).dtype)
    return given


def _alive(state: Rewrite) -> tuple[Tensor, Tensor]:
    """[B, S] bool and the positions of all slots."""
    assert state.live is not None
    rank = _value(state, state.live.rank)
    positions = torch.arange(rank.shape[1], device=rank.device).expand(rank.shape)
    alive = state.live.alive
    return torch.ones_like(rank, dtype=torch.bool) if alive is None else _value(state, alive), positions


def _value(state: Rewrite, node: Node | None) -> Tensor:
    assert node is not None
    value: Tensor = state.sample[node]
    return value


def _run(state: Rewrite, wanted: Iterable[Node]) -> None:
    """Evaluate nodes, and those before them that were not evaluated yet."""
    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed and node not in state.sample:
            needed.add(node)
            todo += node.all_input_nodes
    values: dict[Node, Any] = state.sample
    with _disable_current_modes(), torch.no_grad():
        for node in sorted(needed):
            assert callable(node.target), f"{node} is no operator"
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
