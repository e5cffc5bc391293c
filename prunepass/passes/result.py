"""What a run of the pipeline gave."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import GraphModule

from prunepass.graph.blocks import Block
from prunepass.graph.head import Reading
from prunepass.graph.inputs import ModelInputs
from prunepass.passes.state import Live, Site
from prunepass.plan import PrunePlan
from prunepass.plan.levels import Levels

__all__ = ["PruneResult", "Short"]


@dataclass(frozen=True)
class Short:
    """Results that stay as short as the end of the stream; a mask of their slots is the graph's last result.

    Attributes:
        states: their places among the results.
        told: whether the model reads a mask, so that rows may have slots that hold no token.
    """

    states: tuple[int, ...]
    told: bool


@dataclass(repr=False)
class PruneResult:
    """What a run of the pipeline gave.

    Attributes:
        graph_module: the rewritten graph; the given one itself where the plan prunes nothing.
        blocks: what was found in the model. Their nodes belong to the graph before cleanup.
        sites: where the plan's stages were placed.
        live: nodes that say which tokens are live, before any pruning.
        changes: places changed, by pass, summed over the stages.
        seconds: wall time, by pass.
        reads: how the head reads the residual stream's end.
        levels: the plans of which each call takes one; ``plan`` then has the stages of all. None for a single plan.
        streams: what was done to each stream, where several were pruned each by a plan of its own; ``plan`` then has no
            stages.
        short: with ``restore="none"``, which results are short; None where no mask is returned with them.
    """

    graph_module: GraphModule
    plan: PrunePlan
    mode: str
    inputs: ModelInputs | None = None
    blocks: tuple[Block, ...] = ()
    sites: tuple[Site, ...] = ()
    live: Live | None = None
    changes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reads: frozenset[Reading] = frozenset()
    short: Short | None = None
    levels: Levels | None = None
    streams: tuple[PruneResult, ...] = ()

    @property
    def restored(self) -> bool:
        """Whether the head reads pruned positions, so that something was put there."""
        return bool(self.changes.get("restore"))

    def __repr__(self) -> str:
        nodes = len(self.graph_module.graph.nodes)
        return f"PruneResult({len(self.sites)} stages in {len(self.blocks)} blocks, mode={self.mode!r}, {nodes} nodes)"

    @property
    def kept(self) -> list[str]:
        """Names of the [B, S] bool nodes (mask mode) or [B, K] int64 positions (gather mode) kept, one per stage."""
        nodes = [(s.kept.alive if self.mode == "mask" else s.kept.positions) for s in self.sites if s.kept]
        return [n.name for n in nodes if n is not None]

    @property
    def returns_caches(self) -> bool:
        """Whether the graph returns keys and values of pruned layers."""
        return "cached" in self.changes or self.spreads_caches

    @property
    def spreads_caches(self) -> bool:
        """Whether some of them have a slot for each position of the text, or of a window, and empty ones among them."""
        return "windows" in self.changes

    def nodes_added(self) -> dict[str, int]:
        """How many nodes each pass added."""
        out: dict[str, int] = {}
        for node in self.graph_module.graph.nodes:
            mark = node.meta.get("prunepass")
            if mark:
                out[mark["pass"]] = out.get(mark["pass"], 0) + 1
        return out
