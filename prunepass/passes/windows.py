"""Key-value caches that count positions: a pruned layer's keys and values go back to the slots that they came from.

A layer of a window caches the last tokens of the text, and the masks of later calls say which by their positions. The
tokens that a pruned layer kept stand closer together. They are spread to their old slots before the window is cut out,
with zeros between them, which `prunepass.generation` hides from later tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.errors import RefusalError
from prunepass.graph.inputs import fake_value, hint, is_symbolic, source_name
from prunepass.passes.cached import is_cached, reads_made
from prunepass.passes.contract import Fault, Pass, is_ours, layout_faults
from prunepass.passes.edges import TO_THE_END
from prunepass.passes.propagation import size_faults
from prunepass.passes.result import PruneResult
from prunepass.passes.state import Rewrite
from prunepass.passes.take import take

__all__ = ["SpreadCaches", "cut_to_window", "note_whole", "refuse_alone", "spread"]

aten = torch.ops.aten


def cut_to_window(node: Node) -> list[Node] | None:
    """The slices from keys or values of all tokens, ``slice(x, 2, -n, max)``, to an output that holds the last n, from
    the first one on. None where ``node`` is no such output."""
    chain: list[Node] = []
    at = node
    while _is_whole_slice(at):
        chain.append(at)
        at = at.args[0]  # type: ignore[assignment]  # a node, by the schema
    if not _is_last_slice(at):
        return None
    chain.append(at)
    at = at.args[0]  # type: ignore[assignment]  # a node, by the schema
    while _is_whole_slice(at):
        chain.append(at)
        at = at.args[0]  # type: ignore[assignment]  # a node, by the schema
    return chain[::-1]


def _slice(node: Node) -> tuple[object, object, object, object]:
    """Axis, start, end and step, where left out those of the schema."""
    defaults = (0, None, None, 1)
    given = (*node.args[1:], *defaults[len(node.args) - 1 :])
    return given[0], given[1], given[2], given[3]


def _is_whole_slice(node: Node) -> bool:
    """``x[:]``, along any axis."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    _, start, end, step = _slice(node)
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= TO_THE_END))


def _is_last_slice(node: Node) -> bool:
    """``x[:, :, -n:]``, along the tokens of [B, H, S, D]."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    axis, start, end, step = _slice(node)
    last = step == 1 and (_is_open_width(start) if isinstance(start, Node) else isinstance(start, int) and start < 0)
    return last and axis in (2, -2) and (end is None or (isinstance(end, int) and end >= TO_THE_END))


def _is_open_width(start: Node) -> bool:
    """Whether a number is negative and made of the model's own numbers alone, such as a window's width, which
    ``torch.compile(..., dynamic=True)`` leaves open; not of a size of the inputs."""
    above, made_of = [start], []
    while above:
        node = above.pop()
        made_of += [node] if node.op != "call_function" else []
        above += node.all_input_nodes
        if node.op == "call_function" and isinstance(fake_value(node), Tensor):
            return False
    own = all(n.op == "placeholder" and source_name(n) and "size()" not in source_name(n) for n in made_of)
    return own and bool(made_of) and is_symbolic(fake_value(start)) and hint(fake_value(start)) < 0


def note_whole(state: Rewrite) -> None:
    """Fills ``state.whole`` and ``state.slices``: which caches must hold a slot for each position.

    Those of pruned layers with a window. And in a model with windows the first layer that attends to the whole text:
    by its length the library counts positions for all layers of its kind.
    """
    if state.mode != "gather":
        return
    whole, windows = [], False
    for node in state.output.all_input_nodes:
        chain = cut_to_window(node)
        source = node if chain is None else chain[0].all_input_nodes[0]
        if not is_cached(source, state):
            continue
        windows |= chain is not None
        if chain is None:
            whole.append(node)
        elif state.level.get(source) and _only_returned(chain):
            state.whole[node] = source
            state.slices.update(chain)
    if windows and whole:
        first = min(_layer(n, state) for n in whole)
        state.whole.update((n, n) for n in whole if _layer(n, state) == first and state.level.get(n))


def _only_returned(chain: list[Node]) -> bool:
    """Whether nothing in the model reads what is cut: an attention that did would count slots."""
    return all(user in chain or user.op == "output" for cut in chain for user in cut.users)


def _layer(node: Node, state: Rewrite) -> int:
    """The number of the first attention, in the order of the graph, that stands after keys or values."""
    attentions = sorted(n for block in state.blocks for n in block.attentions)
    return next((i for i, attention in enumerate(attentions) if attention > node), len(attentions))


def spread(x: Tensor, positions: Tensor, alive: Tensor | None, like: Tensor) -> Tensor:
    """[B, H, S, D] from the keys or values of the tokens kept: zeros at the others' slots.

    Args:
        x: [B, H, K, D].
        positions: [B, K] int64, the slots in the original row.
        alive: [B, K] bool, False at surplus slots; None where there are none.
        like: [B, S, ...], for the number of slots.
    """
    rows, length = like.shape[:2]
    slots = positions * 0 + torch.arange(positions.shape[1], device=x.device)[None, :] + 1
    # surplus slots write into a column of their own, which is dropped
    target = positions if alive is None else torch.where(alive, positions, length)
    where = torch.zeros(rows, length + 1, dtype=torch.int64, device=x.device).scatter(1, target, slots)
    with_zero = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2)
    return take(with_zero, where[:, :length], 2, 0)


@dataclass(frozen=True)
class SpreadCaches(Pass):
    """``k[kept][:, :, -n:]`` -> ``spread(k[kept])[:, :, -n:]`` for each output that holds a window of keys or values,
    and ``k[kept]`` -> ``spread(k[kept])`` where the length of the cache must be that of the text."""

    name = "windows"

    def requires(self, state: Rewrite) -> Iterator[Fault]:
        for node, source in state.whole.items():
            kept = state.sites[state.level[source] - 1].kept
            if kept is None or kept.positions is None:
                yield Fault("It is not known where the tokens of this cache stood.", source)
            if node not in state.results():
                yield Fault("A key-value cache is not returned any more.", node)

    def run(self, state: Rewrite) -> int:
        """Returns how many outputs are spread."""
        for node, source in state.whole.items():
            made = self._spread(state, source)
            if node is source:
                state.output.replace_input_with(node, made)
                continue
            chain = cut_to_window(node)
            assert chain is not None
            chain[0].replace_input_with(source, made)
            for cut in chain:
                state.level[cut] = 0
        return len(state.whole)

    def ensures(self, state: Rewrite) -> Iterator[Fault]:
        for old, new in zip(state.outputs, state.results(), strict=True):
            if old not in state.whole:
                continue
            source = state.whole[old]
            chain = cut_to_window(new)
            given = new if chain is None else chain[0].all_input_nodes[0]
            kept = state.sites[state.level[source] - 1].kept
            assert kept is not None
            if not (is_ours(given) and given.meta["prunepass"]["pass"] == self.name):
                yield Fault("A key-value cache that counts positions holds the slots of a pruned layer.", new)
                continue
            for told in (kept.positions, kept.alive):
                if told is not None and not reads_made(given, told, self.name):
                    yield Fault(f"A key-value cache is not spread by {told}, of its own layer.", given)
            shape = state.extents(source)
            yield from layout_faults(state, given, "spread keys or values", shape, state.value(source).dtype)

    def verify(self, state: Rewrite) -> Iterator[Fault]:
        return size_faults(state, len(state.sites))  # results are not restored yet

    def _spread(self, state: Rewrite, source: Node) -> Node:
        site = state.sites[state.level[source] - 1]
        assert site.kept is not None
        positions, alive = site.kept.positions, site.kept.alive
        assert positions is not None
        operands = [
            state.operand(source, length="K"),
            state.operand(positions, "B", "K", dtype=torch.int64),
            state.operand(state.inputs.tokens, "B", "S"),
        ]
        if alive is not None:
            operands.append(state.operand(alive, "B", "K", dtype=torch.bool))

        def build(x: Tensor, positions: Tensor, like: Tensor, alive: Tensor | None = None) -> Tensor:
            return spread(x, positions, alive, like)

        with state.graph.inserting_after(source):
            anchor = state.graph.create_node("call_function", aten.alias.default, (source,))
        with state.graph.inserting_before(anchor):
            made = state.inline(build, operands, stage=site.index, role=self.name, key=(self.name, alive is None))
        state.graph.erase_node(anchor)
        assert isinstance(made, Node)
        return made


def refuse_alone(result: PruneResult) -> None:
    """Raises `RefusalError` for a pruned graph that is handed over by itself and returns spread caches: nothing would
    hide their empty slots from later tokens."""
    if result.spreads_caches:
        raise RefusalError(
            "the graph returns a key-value cache that holds a window. Of a pruned layer it has empty slots, which only "
            "calls that torch.compile runs hide from later tokens.",
            hint="Compile the model, model.compile(backend='tokprune', options=...), or trace it with use_cache=False.",
        )
