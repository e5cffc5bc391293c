"""Several residual streams of one graph, pruned one after another: text and image side by side, as in CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from prunepass.graph.inputs import TOKENS_TO_TRACE
from prunepass.graph.streams import check_separate
from prunepass.graph.wrappers import MARK
from prunepass.passes.result import PruneResult
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice
from prunepass.plan.draft import Planned

__all__ = ["one_after_another"]


def one_after_another(
    gm: GraphModule, choices: Sequence[Choice], prune: Callable[[GraphModule, Planned], PruneResult]
) -> PruneResult:
    """A graph with each of its streams pruned by a plan of its own.

    Marks of nodes that were added for one stream are put aside while the next is pruned, whose passes look for their
    own.

    Args:
        gm: ATen; it is edited.
        choices: of plans that each name a stream.
        prune: as `pipeline.prune_graph`, which edits the graph that it gets, and leaves metadata on new nodes.

    Returns:
        With the results of the single streams in ``streams``.

    Raises:
        PlanError: two plans are of one stream; or as ``prune``.
        RefusalError: one stream leads into another; or as ``prune``.
    """
    check_separate(gm, [str(choice.plan.stream) for choice in choices])
    results: list[PruneResult] = []
    marks: dict[Node, Any] = {}
    for choice in choices:
        with choice.blamed():
            results.append(prune(gm, choice.plan))
        gm = results[-1].graph_module
        marks |= {node: node.meta.pop(MARK) for node in gm.graph.nodes if MARK in node.meta}
    for node in gm.graph.nodes:
        if node in marks:
            node.meta[MARK] = marks[node]
    gm.meta[TOKENS_TO_TRACE] = max(result.plan.tokens_to_trace for result in results)
    changes = {name: sum(r.changes.get(name, 0) for r in results) for r in results for name in r.changes}
    seconds = {name: sum(r.seconds.get(name, 0.0) for r in results) for r in results for name in r.seconds}
    return PruneResult(gm, PrunePlan(()), results[-1].mode, changes=changes, seconds=seconds, streams=tuple(results))
