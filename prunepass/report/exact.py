"""What is saved with no token pruned: the dense model without the tokens that no result needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from prunepass.cost import FlopCounter, corpus_flops
from prunepass.graph.modules import module_path
from prunepass.passes.hoist import HoistReads
from prunepass.passes.unread import without_unread
from prunepass.pipeline import PruneResult
from prunepass.plan import PrunePlan
from prunepass.plan.draft import prunes
from prunepass.report.data import BlockRow, Exact

__all__ = ["exact_savings"]


def exact_savings(
    result: PruneResult,
    dense: FlopCounter,
    places: Mapping[str, int],
    blocks: Sequence[BlockRow],
    shape: tuple[int, int],
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_length: int,
) -> Exact | None:
    """FLOPs of the dense graph without the tokens that no result needs; None where every token is needed.

    A plan that prunes leaves them out wherever its reads allow it. Of one that prunes nothing `torch.compile` does so
    where two attentions or more get fewer queries, and that alone is counted here.

    Args:
        result: what the plan made of the graph.
        dense: of the graph before.
        places: the block of each of its nodes, by name.
        shape: rows of the example, and what the graph's length is counted in.
        lengths, batch_size, max_length: of the corpus, as `corpus_flops` takes them.
    """
    nothing = PrunePlan((), stream=result.plan.stream)
    fewest = 0 if prunes(result.plan) else HoistReads.attentions
    found = without_unread(dense.graph_module, nothing, attentions=fewest, metadata=False)
    if found is None:
        return None
    counter = FlopCounter(found.graph_module, batch=shape[0], length=shape[1], stream=nothing.stream)
    by_node = counter.per_node(*shape)
    example = sum(by_node.values())
    if example >= dense.total(*shape):
        return None
    in_dense = dense.per_node(*shape)
    less = {name for name, count in in_dense.items() if by_node.get(name, 0) < count}
    in_block = [sum(count for name, count in by_node.items() if places.get(name) == block.index) for block in blocks]
    return Exact(
        flops=corpus_flops(counter, lengths, batch_size=batch_size, max_length=max_length),
        example=example,
        blocks=tuple(b.index for b, count in zip(blocks, in_block, strict=True) if count < b.dense_flops),
        block_flops=tuple(in_block),
        layers=_layers([n for n in dense.graph_module.graph.nodes if n.name in less], blocks),
        in_pruned=bool(result.changes.get("hoist")),
    )


def _layers(nodes: Sequence[Node], blocks: Sequence[BlockRow]) -> tuple[str, ...]:
    """Module paths of the layers that ``nodes`` lie in, in order, where some of them are no block of their own."""
    around, _, number = blocks[0].path.rpartition(".")
    if not number.isdigit():
        return ()
    stem = f"{around}."
    inside = [path.removeprefix(stem).split(".")[0] for path in map(module_path, nodes) if path.startswith(stem)]
    layers = tuple(dict.fromkeys(stem + name for name in inside if name.isdigit()))
    return () if {block.path for block in blocks}.issuperset(layers) else layers
