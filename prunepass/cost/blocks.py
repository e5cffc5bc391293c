"""FLOPs of a model's parts as functions of the token count, read off its graph."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from prunepass.cost.flops import FlopCounter
from prunepass.errors import CaptureError
from prunepass.graph.blocks import Block
from prunepass.graph.capture import Captured, ensure_aten
from prunepass.graph.inputs import fake_value
from prunepass.graph.sizes import input_size
from prunepass.graph.streams import find_inputs
from prunepass.plan import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.plan.annotations import Leave
from prunepass.scorers.lens import Lens
from prunepass.scorers.mlp import predictor_shapes

if TYPE_CHECKING:
    from prunepass.passes.result import PruneResult

__all__ = ["BlockCosts", "Quadratic", "block_of_nodes", "probe_plan"]

#: token counts that the quadratics go through, and those that they are checked at
_FITTED = (8, 16, 32)
_CHECKED = (5, 27)
_BATCH, _LENGTH = 2, 16


@dataclass(frozen=True)
class Quadratic:
    """``constant + linear * n + square * n^2``."""

    constant: float
    linear: float
    square: float

    def __call__(self, n: Tensor) -> Tensor:
        """Its value at counts ``n`` (floating, any shape), in their dtype."""
        return self.constant + n * (self.linear + n * self.square)

    @classmethod
    def through(cls, lengths: Sequence[int], values: Sequence[int]) -> Quadratic:
        """The one through three points, by divided differences."""
        (x0, x1, x2), (y0, y1, y2) = lengths, values
        first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        square = (second - first) / (x2 - x0)
        linear = first - square * (x0 + x1)
        return cls(y0 - x0 * (linear + x0 * square), linear, square)


@dataclass(frozen=True)
class BlockCosts:
    """A `CostModel` in FLOPs. Exact: a transformer's FLOPs are quadratic in the token count, whatever its shape.

    Attributes:
        blocks: one a block, in order.
        outside: all else (embeddings, pooler, head).
        scoring: one stage's scorer; selection and gathering have no FLOPs.
        pair: a stage that merges, for each pair of a token that reaches it and one that it keeps: a cosine and a sum.
    """

    blocks: tuple[Quadratic, ...]
    outside: Quadratic
    scoring: Quadratic
    unit: str = "FLOPs"
    pair: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def at(self, block: int, n: Tensor) -> Tensor:
        """FLOPs of one block on ``n`` tokens."""
        return self.blocks[block](n)

    def rest(self, n: Tensor) -> Tensor:
        """FLOPs outside the blocks at the row's unpruned length ``n``: heads run on the restored sequence."""
        return self.outside(n)

    def stage(self, n: Tensor) -> Tensor:
        """FLOPs of scoring the ``n`` tokens that reach a stage."""
        return self.scoring(n)

    @classmethod
    def of(
        cls,
        source: Captured | fx.GraphModule,
        *,
        scorer: ScorerSpec | str | Mapping[str, Any] = "attention",
        hidden: int | None = None,
        lens: int = 0,
        positions: bool = False,
    ) -> BlockCosts:
        """Read off a graph that `prunepass.graph.capture.capture_module` gave, batch and length dynamic.

        Args:
            scorer: whose cost a stage has; measured on the graph pruned at one place.
            hidden: hidden width of the predictor of scorer "mlp"; the model's own, as in SDTP, if not given.
            lens: rank of the lens of a stage, for plans that restore by one; 0 for none.
            positions: whether the predictor looks at places.

        Raises:
            CaptureError: the FLOPs of some part are not quadratic in the length (attention in windows, say).
            RefusalError, PlanError: the model cannot be pruned, or not with this scorer.
        """
        from prunepass.pipeline import analyse, prune_graph

        # Of a copy, which reading edits.
        graph_module = ensure_aten(source.graph_module if isinstance(source, Captured) else source)
        inputs = find_inputs(graph_module)
        if inputs.fixed_length is not None:
            return cls._of_images(graph_module, ScorerSpec.of(scorer), hidden, lens, positions)
        sizes = {n: input_size(inputs, n) for n in (_LENGTH, *_FITTED, *_CHECKED)}  # of a sound in samples
        dense = FlopCounter(graph_module, batch=_BATCH, length=sizes[_LENGTH])
        blocks = analyse(graph_module)[2]
        places = block_of_nodes(graph_module.graph, blocks)
        plan = probe_plan(blocks, scorer, hidden, positions=positions)
        upstream = _as_far_as_scores(prune_graph(graph_module, plan, metadata=False))
        pruned = FlopCounter(upstream, batch=_BATCH, length=sizes[_LENGTH])
        inside: list[set[str]] = [{name for name, i in places.items() if i == block.index} for block in blocks]
        outside = {node.name for node in graph_module.graph.nodes} - places.keys()
        inserted = {node.name for node in upstream.graph.nodes if "prunepass" in node.meta}
        scoring = _fit(pruned, inserted, sizes, f"the scorer {plan.scorer}")
        width = int(fake_value(blocks[0].start).shape[-1])
        return cls(
            blocks=tuple(_fit(dense, inside[b.index], sizes, b.path or f"block {b.index}") for b in blocks),
            outside=_fit(dense, outside, sizes, "what lies outside the blocks"),
            scoring=replace(scoring, linear=scoring.linear + lens_flops(width, lens)),
            pair=4.0 * width,
        )

    @classmethod
    def _of_images(
        cls, graph_module: fx.GraphModule, scorer: ScorerSpec, hidden: int | None, lens: int, positions: bool
    ) -> BlockCosts:
        """The same of a graph whose number of tokens is a constant: others are what a first stage leaves."""
        from prunepass.pipeline import analyse, prune_graph

        inputs, _, blocks = analyse(ensure_aten(graph_module))  # lengths are resolved once in a graph, and anew below
        tokens, first = int(fake_value(inputs.source).shape[1]), max(1, inputs.prefix)
        places = block_of_nodes(graph_module.graph, blocks)
        fewer = sorted({max(first + 1, tokens * part // 4) for part in (1, 2, 3)} - {tokens})
        if len(fewer) < 2:
            raise CaptureError(f"An image of {tokens} tokens is too small to foretell what it costs to leave some out.")
        probe = probe_plan(blocks, scorer, hidden, positions=positions)
        found: dict[int, list[int]] = {}
        scoring: dict[int, int] = {}
        for n in (*fewer[:2], tokens):
            leaving = () if n == tokens else (Stage(0, Fraction(n, tokens), "norm"),)
            last = replace(probe.stages[0], keep=Fraction(first, tokens), scorer=probe.scorer)
            whole = prune_graph(graph_module, replace(PrunePlan(leaving), protect=Protect(first=first)), metadata=False)
            flops = FlopCounter(whole.graph_module).per_node(1, tokens)
            found[n] = [sum(flops.get(name, 0) for name in names) for names in _by_block(places, len(blocks))]
            weights = {f"stages.{len(leaving)}{name.removeprefix('stages.0')}": w for name, w in probe.weights.items()}
            staged = PrunePlan((*leaving, last), protect=Protect(first=first), weights=weights)
            upstream = _as_far_as_scores(prune_graph(graph_module, staged, metadata=False))
            marked = {m.name for m in upstream.graph.nodes if m.meta.get("prunepass", {}).get("stage") == len(leaving)}
            scoring[n] = sum(c for name, c in FlopCounter(upstream).per_node(1, tokens).items() if name in marked)
        dense = FlopCounter(graph_module).per_node(1, tokens)
        outside = sum(count for name, count in dense.items() if name not in places)
        stage = Quadratic.through(list(scoring), list(scoring.values()))
        width = int(fake_value(blocks[0].start).shape[-1])
        return cls(
            blocks=tuple(Quadratic.through(list(found), [f[b] for f in found.values()]) for b in range(len(blocks))),
            outside=Quadratic(float(outside), 0.0, 0.0),
            scoring=replace(stage, linear=stage.linear + lens_flops(width, lens)),
            pair=4.0 * width,
        )

    def with_predictor(self, width: int, hidden: int, lens: int = 0, positions: bool = False) -> BlockCosts:
        """The same model with MLP predictors: ``2 * n * (width * hidden + hidden)`` FLOPs a stage (SDTP, eq. 1).

        Args:
            width: D, of the hidden state.
            hidden: of the predictor.
            lens: rank of the lens beside it, ``4 * n * width * lens`` FLOPs more; 0 for none.
            positions: whether it looks at places, ``4 * n * hidden`` FLOPs more.
        """
        each = 2 * (width * hidden + hidden) + lens_flops(width, lens) + (4 * hidden if positions else 0)
        return replace(self, scoring=Quadratic(0.0, float(each), 0.0))


def lens_flops(width: int, rank: int) -> int:
    """FLOPs of a lens for each token that reaches its stage."""
    return 4 * width * rank


def probe_plan(
    blocks: Sequence[Block],
    scorer: ScorerSpec | str | Mapping[str, Any] = "attention",
    hidden: int | None = None,
    keep: Fraction = Fraction(1, 2),
    lens: int = 0,
    positions: bool = False,
    leave: Leave = "drop",
) -> PrunePlan:
    """A plan of one stage, early in the model, to measure what a stage costs; predictor and lens weigh zero.

    A scorer of attention needs a block before it, so the stage stands before block 1; in a model of a single block,
    after that block's attention.
    """
    stage = Stage(1, keep, leave=leave) if len(blocks) > 1 else Stage(0, keep, after_attention=True, leave=leave)
    spec = ScorerSpec.of(scorer)
    width = int(fake_value(blocks[0].start).shape[-1])
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.name == "mlp":
        shapes = predictor_shapes(width, hidden or width, positions)
    if lens:
        shapes |= {f"lens.{name}": tuple(value.shape) for name, value in Lens(width, lens).state_dict().items()}
    weights = {f"stages.0.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    return PrunePlan((stage,), spec, restore="lens" if lens else "last", weights=weights)


def block_of_nodes(graph: fx.Graph, blocks: Sequence[Block]) -> dict[str, int]:
    """The block of each node of an unpruned graph, by name; nodes before the first and after the last are left out."""
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    ends = [order[block.end.name] for block in blocks]
    start = order[blocks[0].start.name]
    places = {name: bisect_left(ends, i) for name, i in order.items() if i > start}
    return {name: place for name, place in places.items() if place < len(ends)}


def _by_block(places: Mapping[str, int], count: int) -> list[list[str]]:
    return [[name for name, place in places.items() if place == block] for block in range(count)]


def _as_far_as_scores(result: PruneResult) -> fx.GraphModule:
    """The pruned graph up to its last stage's scores: selecting has no FLOPs, and less is quicker to count."""
    graph = result.graph_module.graph
    graph.output_node().args = ((result.sites[-1].scores,),)
    graph.eliminate_dead_code()
    return result.graph_module


def _fit(counter: FlopCounter, names: Set[str], sizes: Mapping[int, int], what: str) -> Quadratic:
    """The quadratic that the nodes of these ``names`` add up to.

    Args:
        sizes: by number of tokens, the least length of the input that gives it.
    """

    def flops(tokens: int) -> int:
        return sum(count for name, count in counter.per_node(1, sizes[tokens]).items() if name in names)

    fitted = Quadratic.through(_FITTED, [flops(n) for n in _FITTED])
    for n in _CHECKED:
        given, found = flops(n), float(fitted(torch.tensor(float(n), dtype=torch.float64)))
        if abs(found - given) > 1e-6 * max(given, 1):
            raise CaptureError(
                f"The FLOPs of {what} are not quadratic in the number of tokens (at {n} they are {given}, not "
                f"{found:.0f}), so they cannot be foretold at other lengths. Measure the model's latency instead, with "
                "LatencyTable.measure."
            )
    return fitted
