"""What the passes share while one graph is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.utils import _pytree as pytree

from prunepass.graph.blocks import Block
from prunepass.graph.inputs import ModelInputs, fake_value, is_symbolic
from prunepass.graph.sizes import AxisKind, Sizes
from prunepass.graph.trace import Extent, Number, Operand, inline
from prunepass.plan import PrunePlan, Stage, kept_count
from prunepass.plan.counts import MAX_LENGTH
from prunepass.plan.levels import Levels
from prunepass.scorers import Scorer

__all__ = ["Kept", "Live", "Merged", "Rewrite", "Site", "latest"]


@dataclass(frozen=True)
class Live:
    """Nodes of `passes.live.live_tokens`."""

    alive: Node | None
    rank: Node
    count: Node | None
    padding: Node | None
    protected: Node
    end: Node
    order: Node
    leaving: Node | None = None


@dataclass(frozen=True)
class Kept:
    """Nodes of a stage's choice: see `passes.select.Selection`. In mask mode only ``alive`` ([B, S]) is set, and with a
    trained gate (`passes.gate`) ``degree``, [B, S] float32 in [0, 1]: how much of each token is there."""

    index: Node | None
    positions: Node | None
    alive: Node | None
    degree: Node | None = None


@dataclass(frozen=True)
class Merged:
    """Nodes of `passes.merge.merge`: how many original tokens each state stands for, and where each token went.

    Attributes:
        complete: whether each token is sure to have a host, so that none was dropped.
    """

    sizes: Node
    host: Node
    complete: bool = False


@dataclass
class Site:
    """A stage at its place in the graph.

    Attributes:
        index: which stage of the plan.
        stage, scorer: what it asks for.
        block: the block it stands before, or after whose attention it stands.
        cut: the value of the residual stream that is narrowed.
        attentions: the attention nodes that an attention scorer reads; those of the block before the cut.
        variants: where plans differ in the weights of the scorer, it with each set of them, and ``which`` of them each
            level takes; see `passes.budgets`.
        scores, width, kept, narrowed: nodes that the passes add; ``width`` is K as a number.
        end: [B, 1] int64 node, the place of the last token that each row keeps, where a level says it.
        merged: where tokens went, in a plan with a stage that merges.
        vectors, levels: how hosts are found, [B, T, W] and [B, T]; None as in `scorers.Hosts`.
        lens: the parameters of the scorer's lens, by name; empty where it has none.
    """

    index: int
    stage: Stage
    scorer: Scorer
    block: Block
    cut: Node
    attentions: tuple[Node, ...]
    variants: tuple[Scorer, ...] = ()
    which: tuple[int, ...] = ()
    scores: Node | None = None
    width: Node | None = None
    kept: Kept | None = None
    narrowed: Node | None = None
    end: Node | None = None
    merged: Merged | None = None
    vectors: Node | None = None
    levels: Node | None = None
    lens: Mapping[str, Node] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """In words, for messages: ``before block 3``."""
        return self.stage.place

    @property
    def path(self) -> str:
        """Module path of its block."""
        return self.block.path


@dataclass
class Rewrite:
    """One graph on its way from dense to pruned.

    Attributes:
        gm: the graph, edited in place.
        mode: "gather" or "mask".
        level: for each original node the number of cuts above it: at level 0 the sequence has its full length.
        reads_protected: whether the head reads protected tokens only, so that nothing needs restoring.
        pooled: the mean of the tokens kept, [B, D], where `passes.pool` put it in the place of the head's mean.
        operands: what is known of the nodes that passes added, where later passes build on them.
        cached: outputs that are keys or values of a pruned layer; they stay as short as it is.
        whole: outputs of a pruned layer's keys or values that must have a slot for each position, and what they are cut
            from, the keys or values of all its tokens: see `passes.windows`.
        slices: the nodes that cut them.
        short: outputs that stay as short as the end of the stream, see `passes.short`.
        gates: in mask mode, modules that choose in place of the top scores, by stage; see `passes.gate`.
        thinned: nodes that `passes.hoist` lets work on fewer tokens than their layer has, and on how many.
        taps: values of the stream that a head takes out of its middle at full length, and the nodes that read them so.
        sample: values of nodes on a few random rows, see `passes.samples`.
        levels: the plans of which each call takes one; ``plan`` then has the stages of all.
        chosen: [1] int64, which of them, within bounds; see `passes.budgets`.
        indices: by which set of weights each level takes, the number of the call's, see `passes.variants`.
        placeholders, outputs: the graph's inputs and results as they were before any pass.
    """

    gm: GraphModule
    plan: PrunePlan
    mode: str
    inputs: ModelInputs
    sizes: Sizes
    blocks: tuple[Block, ...]
    sites: list[Site]
    level: dict[Node, int] = field(default_factory=dict)
    live: Live | None = None
    reads_protected: bool = False
    protected_reads: frozenset[str] = frozenset()
    pooled: Node | None = None
    operands: dict[Node, Operand] = field(default_factory=dict)
    cached: set[Node] = field(default_factory=set)
    whole: dict[Node, Node] = field(default_factory=dict)
    slices: set[Node] = field(default_factory=set)
    short: list[Node] = field(default_factory=list)
    gates: Mapping[int, nn.Module] = field(default_factory=dict)
    thinned: dict[Node, int] = field(default_factory=dict)
    taps: dict[Node, list[Node]] = field(default_factory=dict)
    sample: dict[Node, Any] = field(default_factory=dict)
    levels: Levels | None = None
    chosen: Node | None = None
    indices: dict[tuple[int, ...], Node] = field(default_factory=dict)
    placeholders: tuple[Node, ...] = field(init=False)
    outputs: tuple[Any, ...] = field(init=False)
    _slots: dict[tuple[Node, Node], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placeholders = tuple(self.graph.find_nodes(op="placeholder"))
        self.outputs = self.results()

    def results(self) -> tuple[Any, ...]:
        """What the graph returns now, in order: nodes, and constants."""
        return tuple(pytree.tree_leaves(self.output.args))

    @property
    def output(self) -> Node:
        """The output node."""
        node: Node = next(iter(self.graph.find_nodes(op="output")))
        return node

    @property
    def graph(self) -> Graph:
        """The graph being edited."""
        return self.gm.graph

    @property
    def last_placeholder(self) -> Node:
        """The place after which values of the inputs can be computed."""
        last: Node = list(self.graph.find_nodes(op="placeholder"))[-1]
        return last

    @property
    def known_at(self) -> Node:
        """The place after which the tokens and their mask are there: behind all inputs, or what is made of them."""
        inputs = self.inputs
        return self.last_placeholder if inputs.made_from is None else latest(inputs.source, inputs.attention_mask)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = fake_value(self.inputs.source).device
        return device

    @property
    def stream_end(self) -> Node:
        """The residual stream after the last block."""
        return self.blocks[-1].end

    @property
    def leaves_short(self) -> bool:
        """Whether nothing is put back at the end of the stream, so that what reads it stands below the cuts, too."""
        return self.reads_protected or self.plan.restore == "none"

    def kept_before(self, site: Site) -> Kept | None:
        """What the stage before this one kept."""
        at = self.sites.index(site)
        return self.sites[at - 1].kept if at else None

    def value(self, node: Node) -> torch.Tensor:
        """An original node's meta tensor at the first probe: for its dtype and its constant sizes."""
        value = self.sizes.first.values[node]
        assert isinstance(value, torch.Tensor), f"{node} is no tensor"
        return value

    def operand(self, node: Node, *shape: Extent, dtype: torch.dtype | None = None, length: str = "S") -> Operand:
        """A node as an operand of a traced function.

        A node that a pass added is given by ``shape`` and ``dtype``, or was noted in ``operands``; an original node
        knows its own axes, with ``length`` for the sequence.
        """
        if dtype is not None:
            return Operand(node, shape, dtype, self.device)
        if node in self.operands:
            return self.operands[node]
        value = self.value(node)
        return Operand(node, self.extents(node, length), value.dtype, self.device)

    def extents(self, node: Node, length: str = "S") -> tuple[Extent, ...]:
        """The axes of an original node, in the words of `graph.trace.Operand`."""
        out: list[Extent] = []
        for size, axis in zip(self.value(node).shape, self.sizes.axes(node) or (), strict=True):
            if axis.kind is AxisKind.CONST:
                out.append(self._constant(node, len(out), int(size)))
            elif axis.kind is AxisKind.BATCH:
                out.append("B" if axis.factor == 1 else f"B*{axis.factor}")
            else:
                out.append(length)
        return tuple(out)

    def _constant(self, node: Node, axis: int, size: int) -> Extent:
        """An axis that follows neither the batch nor the length: "Q" where the graph holds it open, a decoder's own."""
        if self.sizes.one_row and node in self.inputs.sequence and axis == 0:
            return "B"
        value = node.meta.get("val")
        return "Q" if isinstance(value, torch.Tensor) and is_symbolic(value.shape[axis]) else size

    def buffer(self, name: str, value: torch.Tensor, *, stage: int | None, role: str, persistent: bool) -> Operand:
        """A tensor beside the model's weights, as an operand of traced functions.

        Args:
            name: of the buffer.
            persistent: whether it is part of the ``state_dict``, as trained weights are.
        """
        self.gm.register_buffer(name, value.to(self.device), persistent=persistent)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        node.meta = {"prunepass": {"stage": stage, "pass": role}}
        return Operand(node, tuple(value.shape), value.dtype, self.device)

    def inline(
        self,
        function: Callable[..., Any],
        operands: Sequence[Operand | Number],
        *,
        stage: int | None,
        role: str,
        key: Any = None,
    ) -> Any:
        """Insert a traced function at the insert point, marked as ours.

        Args:
            function, operands, key: see `graph.trace.inline`.
            stage: whose place in the model the nodes belong to; None for the embeddings'.
            role: name of the pass.

        Returns:
            The node of the result, or a tuple of them.

        Raises:
            RefusalError: the function computes a size in a way that cannot be followed.
        """
        like = self.sites[[s.index for s in self.sites].index(stage)].cut if stage is not None else self.inputs.source
        meta: dict[str, Any] = {"prunepass": {"stage": stage, "pass": role}}
        for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if name in like.meta:
                meta[name] = like.meta[name]
        if self.sizes.one_row:
            operands = [_of_one_row(o) for o in operands]
        return inline(self.graph, function, operands, meta=meta, key=key)

    def width(self, site: Site) -> Node:
        """The node of K, the number of slots that a site leaves: arithmetic on the length, at the insert point, or
        what a level says."""
        if site.width is not None:
            return site.width
        length = Proxy(self.graph.call_function(torch.ops.aten.sym_size.int, (self.inputs.tokens, 1)))
        marks = {"prunepass": {"stage": site.index, "pass": "select"}}
        length.node.meta = dict(marks)

        def call(function: Any) -> Callable[[Any, Any], Any]:
            def make(a: Any, b: Any) -> Proxy:
                args = tuple(x.node if isinstance(x, Proxy) else x for x in (a, b))
                return Proxy(self.graph.call_function(function, args))

            return make

        if self.inputs.prompt is not None and self.inputs.prompt.widths:
            told: Node = call(torch.sym_min)(length, self.inputs.prompt.widths[site.index]).node
            told.meta = dict(marks)
            return told
        count = kept_count(
            length,
            site.stage.keep,
            self.plan.protect,
            minimum=call(torch.sym_min),
            maximum=call(torch.sym_max),
            longest=self.longest,
        )
        width: Node = count.node
        todo = [width]
        while todo:
            node = todo.pop()
            node.meta = dict(marks)
            todo += [a for a in node.all_input_nodes if a is not length.node and a is not self.inputs.tokens]
        return width

    @property
    def longest(self) -> int:
        """An upper bound of the tokens of a row, as far as the tracer knows one, as from a table of positions. A power
        of two, so that what is traced for one length does for others."""
        length = fake_value(self.inputs.tokens).shape[1]
        if is_symbolic(length):
            bound = length.node.shape_env.bound_sympy(length.node.expr).upper
            length = bound if bound.is_Integer else MAX_LENGTH
        return min(1 << max(int(length) - 1, 0).bit_length(), MAX_LENGTH)

    def constant_slots(self, site: Site | None) -> int | None:
        """How many slots a stage leaves, None for those before the first, where the model and the plan alone say it."""
        length, told = self.inputs.fixed_length, self.inputs.prompt is not None and self.inputs.prompt.widths
        if length is None or self.levels or told:
            return None
        return length if site is None else int(kept_count(length, site.stage.keep, self.plan.protect))

    def at_slots(self, node: Node | None, kept: Kept | None) -> Node | None:
        """A [B, S] value of the original slots, at the slots that a stage kept."""
        if node is None or kept is None:
            return node
        assert kept.positions is not None
        found = self._slots.get((node, kept.positions))
        if found is None:
            with self.graph.inserting_after(latest(node, kept.positions, kept.alive)):
                found = self.graph.call_function(torch.ops.aten.gather.default, (node, 1, kept.positions))
            found.meta = {k: v for k, v in kept.positions.meta.items() if k != "val"}
            self._slots[node, kept.positions] = found
        return found

    def score_dtype(self, site: Site) -> torch.dtype:
        """Scores come in at least float32 (`scorers.base.as_scores`)."""
        assert site.scores is not None
        dtype = site.scores.meta["prunepass"]["dtype"]
        assert isinstance(dtype, torch.dtype)
        return dtype


def _of_one_row(operand: Operand | Number) -> Operand | Number:
    """An operand of a graph that was traced for a batch of one: its batch is a constant."""
    if isinstance(operand, Number):
        return operand
    shape = tuple(
        int(e.partition("*")[2] or 1) if isinstance(e, str) and e.partition("*")[0] == "B" else e for e in operand.shape
    )
    return replace(operand, shape=shape)


def latest(*nodes: Node | None) -> Node:
    """Of some nodes the one that stands last in the graph: after it a node that reads them all may be inserted."""
    return max(node for node in nodes if node is not None)
