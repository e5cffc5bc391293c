"""Side values of a cut: what its consumers read that does not depend on the hidden state, at the kept tokens.

Masks, rotary tables, relative positions, the length as an integer: computed at full length as before, and gathered by
original position on each of their sequence axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from prunepass.errors import RefusalError
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SDPA, is_pointwise
from prunepass.graph.sizes import AxisKind
from prunepass.graph.trace import Extent, Operand
from prunepass.passes.state import Rewrite, Site
from prunepass.passes.take import take

__all__ = ["ROLE", "Memo", "Visit", "index_of"]

aten = torch.ops.aten
#: the pass that these nodes belong to
ROLE = "narrow"


@dataclass(frozen=True)
class Memo:
    """What was gathered at a site: a value that many layers use is gathered once."""

    tensors: dict[tuple[Node, int | None], Node] = field(default_factory=dict)
    numbers: dict[Node, Node] = field(default_factory=dict)


def index_of(site: Site) -> Node:
    """[B, K] int64: the slots kept, among those that reached the cut."""
    assert site.kept is not None, "select runs before narrow"
    assert site.kept.index is not None, "narrow runs in gather mode only"
    return site.kept.index


@dataclass
class Visit:
    """One consumer below the cut, while its arguments are replaced.

    Attributes:
        level: number of cuts above the consumer, this one included.
        changed: whether any argument was replaced.
    """

    memo: Memo
    rewrite: Rewrite
    site: Site
    level: int
    node: Node
    changed: bool = False

    def argument(self, a: Node) -> Any:
        """What the consumer reads below the cut in place of ``a``."""
        new = self._argument(a)
        self.changed |= new is not a
        return new

    def _argument(self, a: Node) -> Any:
        if a is self.site.cut:
            return self.site.narrowed
        level = self.rewrite.level.get(a, 0)
        sizes = self.rewrite.sizes
        if level == self.level or not sizes.follows_length(a):
            return a
        if sizes.number(a) is not None:
            # a plain operand (a scale by the length, say) keeps its meaning; sizes follow the gathered sequence
            return a if is_pointwise(self.node) else self._number(a)
        if level:
            raise RefusalError(
                f"{a.name} of an earlier layer reaches {self.node.name} around the cut {self.site.place}.",
                where=module_path(self.node) or self.node.name,
                hint="Place no stage between the two layers.",
            )
        return self._tensor(a, self._batch_place(a))

    # -- numbers -----------------------------------------------------------------------------------------------

    def _number(self, a: Node) -> Node:
        if a not in self.memo.numbers:
            self.memo.numbers[a] = self._compute_number(a)
        return self.memo.numbers[a]

    def _compute_number(self, a: Node) -> Node:
        axis = self.rewrite.sizes.number(a)
        assert axis is not None
        graph, index = self.rewrite.graph, index_of(self.site)
        if axis.is_sequence:
            with graph.inserting_after(index):
                return self._mark(graph.call_function(aten.sym_size.int, (index, 1)))
        if a.target is aten.sym_size.int or a.op == "placeholder":
            raise RefusalError(
                f"a size that is {axis.factor} times the length, or not a multiple of it, crosses the cut "
                f"{self.site.place} into {self.node.name}.",
                where=module_path(self.node) or self.node.name,
                hint="Place the stages after this layer.",
            )
        args = map_arg(a.args, lambda n: self._number(n) if self.rewrite.sizes.follows_length(n) else n)
        assert callable(a.target)
        with graph.inserting_before(self.node):
            return self._mark(graph.call_function(a.target, args))

    # -- tensors -----------------------------------------------------------------------------------------------

    def _batch_place(self, a: Node) -> int | None:
        """The axis of a side value that stands where the consumer has its batch; negative: to its left."""
        sizes = self.rewrite.sizes
        if sizes.one_row:
            return None
        own = _batch_axis(self.rewrite, a)
        if own is not None:
            return own
        rank = len(sizes.axes(a) or ())
        place = _batch_axis(self.rewrite, self.node)
        aligned = is_pointwise(self.node) or self.node.target is SDPA
        if place is None or not (aligned or len(sizes.axes(self.node) or ()) == rank):
            raise RefusalError(
                f"{a.name} is shared by the rows of the batch and meets {self.node.target}, where the rows' places in "
                "it cannot be told.",
                where=module_path(self.node) or self.node.name,
                hint="Place the stages after this layer.",
            )
        return place - (len(sizes.axes(self.node) or ()) - rank)

    def _tensor(self, a: Node, batch: int | None) -> Node:
        key = (a, batch)
        if key not in self.memo.tensors:
            made = self._rebuild(a, batch)
            self.memo.tensors[key] = made if made is not None else self._gather(a, batch)
        return self.memo.tensors[key]

    def _rebuild(self, a: Node, batch: int | None) -> Node | None:
        """Gathering sunk below cheap operations: ``gather(and(x, y))`` -> ``and(gather(x), gather(y))``.

        For values of [..., S, S], whose parts are mostly [..., 1, S]: gathering those is linear in S, and runtimes fuse
        the rebuilt mask as they did the original one.
        """
        if len(self.rewrite.sizes.sequence_axes(a)) < 2 or (batch is not None and batch < 0):
            return None
        if self.rewrite.inputs.fixed_length is not None:
            return None  # the parts were made for that length, and their axes are not told apart
        if a.target is aten.expand.default:
            return self._rebuild_expand(a, batch)
        if not is_pointwise(a) or a.kwargs.get("out") is not None:
            return None
        rank = len(self.rewrite.sizes.axes(a) or ())
        parts: dict[Node, Node] = {}
        for part in a.all_input_nodes:
            if not self.rewrite.sizes.follows_length(part) or self.rewrite.sizes.number(part) is not None:
                continue
            place = None if batch is None else batch - (rank - len(self.rewrite.sizes.axes(part) or ()))
            if place is not None and (place < 0 or not self._has_row_axis(part, place)):
                return None
            parts[part] = self._tensor(part, place)
        return self._clone(a, parts, a.args)

    def _rebuild_expand(self, a: Node, batch: int | None) -> Node | None:
        source: Any = a.args[0]
        axes, inner = self.rewrite.sizes.axes(a) or (), self.rewrite.sizes.axes(source) or ()
        offset = len(axes) - len(inner)
        place = None if batch is None else batch - offset
        if place is not None and (place < 0 or not self._has_row_axis(source, place)):
            return None
        made = self._tensor(source, place) if self.rewrite.sizes.follows_length(source) else source
        sizes: Any = a.args[1]
        shape: list[Any] = list(sizes)
        for i, axis in enumerate(axes):
            if i == batch:
                shape[i] = -1 if made is not source else shape[i]
            elif axis.is_sequence:
                shape[i] = self._length()
        return self._clone(a, {source: made}, (source, shape, *a.args[2:]))

    def _length(self) -> Node:
        """The gathered length as a node."""
        index = index_of(self.site)
        if index not in self.memo.numbers:
            with self.rewrite.graph.inserting_after(index):
                made = self.rewrite.graph.call_function(aten.sym_size.int, (index, 1))
            self.memo.numbers[index] = self._mark(made)
        return self.memo.numbers[index]

    def _has_row_axis(self, node: Node, place: int) -> bool:
        axis = (self.rewrite.sizes.axes(node) or ())[place]
        return axis.kind is AxisKind.BATCH or (
            axis.kind is AxisKind.CONST and self.rewrite.value(node).shape[place] == 1
        )

    def _clone(self, a: Node, parts: dict[Node, Node], args: Any) -> Node:
        with self.rewrite.graph.inserting_before(self.node):
            made = self.rewrite.graph.create_node(
                a.op, a.target, map_arg(args, lambda n: parts.get(n, n)), map_arg(a.kwargs, lambda n: parts.get(n, n))
            )
        made.meta = {k: v for k, v in a.meta.items() if k not in ("val", "example_value")}
        return self._mark(made, like=a)

    def _gather(self, a: Node, batch: int | None) -> Node:
        """The value itself, gathered on each sequence axis."""
        rewrite, kept = self.rewrite, self.site.kept
        assert kept is not None
        assert kept.positions is not None
        axes = list(rewrite.sizes.axes(a) or ())
        for axis in axes:
            if axis.follows_length and not axis.is_sequence:
                raise RefusalError(
                    f"{a.name} has an axis that grows with the length but is not the sequence (a table of all pairs, "
                    f"or a flattened sequence) and crosses the cut {self.site.place} into {self.node.name}.",
                    where=module_path(self.node) or self.node.name,
                    hint="Place the stages after this layer.",
                )
        places = [i for i, axis in enumerate(axes) if axis.is_sequence]
        pad = -batch if batch is not None and batch < 0 else 0
        row = (batch or 0) + pad
        heads = axes[row].factor if pad == 0 and axes[row].kind is AxisKind.BATCH else 1
        shared = pad > 0 or axes[row].kind is not AxisKind.BATCH
        folded = self._folded_heads() if shared and batch is not None else 1

        def build(x: Tensor, index: Tensor) -> Tensor:
            if batch is None:  # one row: plain look-ups, wherever the batch may be folded in
                for place in places:
                    x = x.index_select(place, index.reshape(-1))
                return x
            x = x.reshape((1,) * pad + x.shape) if pad else x
            one_row = shared
            for place in places:
                x = take(x, index, place + pad, row, heads, shared=one_row)
                one_row = False
            return x.repeat_interleave(folded, dim=row) if folded > 1 else x

        operands = [rewrite.operand(a), rewrite.operand(kept.positions, "B", "K", dtype=torch.int64)]
        key = ("side", tuple(places), batch is None, pad, row, heads, shared, folded)
        with rewrite.graph.inserting_before(self.node):
            made = rewrite.inline(build, operands, stage=self.site.index, role=ROLE, key=key)
        assert isinstance(made, Node)
        return self._mark(made, like=a, batch=None if batch is None else row, pad=pad)

    def _folded_heads(self) -> int:
        """Heads that the consumer has folded into its batch axis."""
        for axis in self.rewrite.sizes.axes(self.node) or ():
            if axis.kind is AxisKind.BATCH:
                return axis.factor
        return 1

    def _mark(self, made: Node, like: Node | None = None, batch: int | None = None, pad: int = 0) -> Node:
        """Metadata of an added node; for a narrowed tensor also its axes, for passes that build on it."""
        made.meta.setdefault("prunepass", {"stage": self.site.index, "pass": ROLE})
        made.meta.setdefault("nn_module_stack", self.site.cut.meta.get("nn_module_stack", {}))
        if like is not None:
            shape: list[Extent] = [*([1] * pad), *("K" if e == "S" else e for e in self.rewrite.extents(like))]
            place = batch if batch is not None else self._batch_place(like)
            if place is not None and 0 <= place < len(shape) and shape[place] == 1:
                shape[place] = "B"
            value = self.rewrite.value(like)
            # to the scorer of the next stage, what this stage keeps is what reaches it
            tail = tuple("T" if e == "K" else e for e in shape)
            self.rewrite.operands[made] = Operand(made, tail, value.dtype, self.rewrite.device)
        return made


def _batch_axis(rewrite: Rewrite, node: Node) -> int | None:
    """The axis that holds the rows, with or without heads folded into it."""
    for i, axis in enumerate(rewrite.sizes.axes(node) or ()):
        if axis.kind is AxisKind.BATCH:
            return i
    return None
