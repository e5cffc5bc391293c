"""A fixed number of tokens, as of an image: replayed at other lengths from the source on.

What does not depend on the source runs as it was traced. Where a later value does not fit what was made for exactly the
traced number (a mask, a table of positions), that is cut to the probe's length: this tells which of its axes are the
tokens. What follows the last attention and runs at the traced number only, such as a head that lays the patches out as
an image, stays at full length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from prunepass.errors import RefusalError
from prunepass.graph.extents import Reading, with_reading
from prunepass.graph.inputs import ModelInputs, fake_value
from prunepass.graph.kinds import kind_of
from prunepass.graph.modules import module_path
from prunepass.graph.sizes import Probe, Sizes, shape_of
from prunepass.graph.sources import attentions_in
from prunepass.graph.views import VIEWS

__all__ = ["FixedLength", "in_order"]


def in_order(graph: Graph, inputs: ModelInputs) -> list[Node]:
    """The nodes, with all that does not depend on a source of fixed length first."""
    nodes = list(graph.nodes)
    if inputs.fixed_length is None:
        return nodes
    return [n for n in nodes if n in inputs.front] + [n for n in nodes if n not in inputs.front]


class FixedLength:
    """What is cut, and what is whole, in one replay.

    Attributes:
        length: tokens of a row; None where they are no constant, and nothing here applies.
        front: what does not depend on the source.
        whole: nodes that run at the traced number of tokens only.
    """

    def __init__(self, original: Probe, first: Probe, second: Probe, nodes: list[Node]) -> None:
        self.original, self.first, self.second = original, first, second
        inputs = first._inputs
        self.length = inputs.fixed_length
        self.front = inputs.front if self.length is not None else frozenset()
        self.whole: set[Node] = set()
        self._uncut: dict[Node, tuple[Any, Any]] = {}
        self._mixing: set[Node] = set()
        if self.length is None or not nodes:
            return
        content = {n for n in nodes if n not in self.front}
        todo = [n for n in attentions_in(nodes[0].graph) if n in content]
        self._mixing = set(todo)
        while todo:
            for a in todo.pop().all_input_nodes:
                if a in content and a not in self._mixing:
                    self._mixing.add(a)
                    todo.append(a)

    # -- sides ---------------------------------------------------------------------------------------------------------

    def cuts(self, node: Node) -> Iterator[None]:
        """Each way to cut what ``node`` reads of the front along axes of the traced number of tokens, done at both
        probes; undone when another is asked for."""
        if self.length is None or node in self.front:
            return
        sides = [a for a in node.all_input_nodes if a in self.front and self._axes(a)]
        options = [list(_subsets(self._axes(a))) for a in sides]
        for chosen in itertools.product(*options):
            if not any(chosen):
                continue
            for side, axes in zip(sides, chosen, strict=True):
                self._cut(side, axes)
            yield
            for side in sides:
                self._restore(side)

    def _axes(self, side: Node) -> list[int]:
        """Axes as long as there are tokens; none where it is cut already."""
        value = self.first.values.get(side)
        if side in self._uncut or not isinstance(value, torch.Tensor):
            return []
        other = self.second.values[side]
        pairs = zip(value.shape, other.shape, strict=True)
        return [i for i, (m, n) in enumerate(pairs) if m == n == self.length]

    def _cut(self, side: Node, axes: tuple[int, ...]) -> None:
        if not axes:
            return
        self._uncut[side] = self.first.values[side], self.second.values[side]
        for probe in (self.first, self.second):
            for axis in axes:
                probe.values[side] = probe.values[side].narrow(axis, 0, probe.length)

    def _restore(self, side: Node) -> None:
        if side in self._uncut:
            self.first.values[side], self.second.values[side] = self._uncut.pop(side)

    def check(self, readings: dict[Node, Reading]) -> None:
        """Raises `RefusalError` where a value that was cut is also read by something that took it as it was."""
        mask = self.first._inputs.attention_mask
        if self.length is not None and mask is not None and self._axes(mask):
            self._cut(mask, (1,))
        for side in self._uncut:
            for user in side.users:
                if user in self.front or user in self.whole or user.op == "output":
                    continue
                for probe in (self.first, self.second):
                    before = shape_of(probe.values[user])
                    args, kwargs = with_reading(user, readings.get(user, ()), probe)
                    try:
                        after = shape_of(probe.step(user, args, kwargs))
                    except Exception:  # fake kernels raise whatever the operator raises
                        after = None
                    if after != before:
                        raise RefusalError(
                            f"{side.name}, made for {self.length} tokens, is read in two ways that do not fit one "
                            f"another ({user.name}).",
                            where=module_path(user) or user.name,
                            hint="prunepass follows masks and tables of one axis for each token.",
                        )

    def refusal(self, node: Node, message: str) -> RefusalError | None:
        """Why a node fails at other numbers of tokens; None where they are no constant."""
        if self.length is None:
            return None
        where = module_path(node) or node.name
        shape = [int(n) if isinstance(n, int) else -1 for n in getattr(fake_value(node), "shape", ())]
        if node.target in VIEWS and self.length not in shape and (kind := self._behind(node)) is not None:
            return RefusalError(
                f"the {self.length} tokens are laid out as an image there ({node.target}, {node.name}), and {kind}, "
                "before attention: tokens left out would leave holes in it.",
                where=where,
                hint="prunepass prunes models whose attention is over all tokens of an image at once.",
            )
        return RefusalError(
            f"{node.target} ({node.name}) needs exactly the {self.length} tokens that the model was traced with: "
            f"{message}.",
            where=where,
            hint="prunepass prunes models whose attention is over all tokens of an image or of a sound at once.",
        )

    def _behind(self, node: Node) -> str | None:
        """What happens to an image of tokens: a convolution or a pooling, or windows of it are attended to."""
        near, edge = {node}, [node]
        for _ in range(8):
            edge = [u for n in edge for u in n.users if u not in near]
            near.update(edge)
            for user in edge:
                if (kind := kind_of(user)) is not None and any(word in kind for word in ("convolution", "pooling")):
                    return f"{user.target} is {kind.replace('the sequence', 'it')}"
        return "it is cut into windows or parts"

    # -- heads ---------------------------------------------------------------------------------------------------------

    def is_behind_whole(self, node: Node) -> bool:
        """Whether a node reads what is whole."""
        return bool(self.whole) and node.op != "output" and any(a in self.whole for a in node.all_input_nodes)

    def may_be_whole(self, node: Node) -> bool:
        """Whether no attention depends on a node."""
        return self.length is not None and node not in self.front and node not in self._mixing

    def take_whole(self, node: Node) -> str | None:
        """Evaluate a node at the traced number of tokens. None on success, else why it did not go."""
        try:
            if node not in self.original.values:
                self.original.step(node)
            for probe in (self.first, self.second):
                self._step_whole(node, probe)
        except Exception as e:  # fake kernels raise whatever the operator raises
            return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
        self.whole.add(node)
        return None

    def _step_whole(self, node: Node, probe: Probe) -> None:
        kept = {a: probe.values[a] for a in node.all_input_nodes}
        sizes = Sizes(self.first, self.second)
        try:
            for a, value in kept.items():
                if isinstance(value, torch.Tensor) and sizes.follows_length(a):
                    probe.values[a] = self._at_full_length(a, value, sizes, probe)
            made = probe.step(node)
        finally:
            probe.values |= kept
        probe.values[node] = made

    def _at_full_length(self, a: Node, value: torch.Tensor, sizes: Sizes, probe: Probe) -> torch.Tensor:
        axes, traced = sizes.axes(a) or (), fake_value(a)
        shape = []
        for axis, n, size in zip(axes, value.shape, traced.shape, strict=True):
            if not axis.follows_length:
                shape.append(n)
            elif isinstance(size, int):
                shape.append(size)
            else:
                assert self.length is not None
                shape.append(n // probe.length * self.length)
        return value.new_empty(shape)


def _subsets(axes: list[int]) -> Iterator[tuple[int, ...]]:
    """All axes, fewer, none."""
    for count in range(len(axes), -1, -1):
        yield from itertools.combinations(axes, count)
