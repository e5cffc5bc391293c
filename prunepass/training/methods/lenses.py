"""Fitting lenses (`prunepass.scorers.lens`) to what the dense model makes of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prunepass.scorers.lens import Lens, Moments
from prunepass.training.data.distances import live
from prunepass.training.data.heads import Head
from prunepass.training.methods.graphs import Watched

__all__ = ["fit_lenses"]


@torch.no_grad()
def fit_lenses(
    early: Watched,
    late: Watched,
    head: Head,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    cuts: Sequence[int],
    end: int,
    rank: int,
) -> dict[int, Lens]:
    """A lens for each cut, by regression over the live tokens of ``batches``: seconds, and no steps of an optimiser.

    Args:
        early: whose states at the cuts are read.
        late: whose states after the last block are to be met; mostly the same graph as ``early``.
        cuts: blocks to fit for; both graphs have taps where they are needed.
        end: the number of blocks, under which the tap after the last one stands.
        rank: of the lenses.
    """
    moments: dict[int, Moments] = {}
    for batch in batches:
        inputs, alive = head.model_inputs(batch), live(batch)
        for graph in {id(g): g for g in (early, late)}.values():
            graph.module(**inputs)
        target = _taken(late, end)[alive]
        for cut in cuts:
            state = _taken(early, cut)[alive]
            moments.setdefault(cut, Moments(state.shape[-1], state.device)).add(state, target)
    return {cut: moment.lens(rank) for cut, moment in moments.items()}


def _taken(graph: Watched, block: int) -> Tensor:
    value = graph.hidden[block].value
    assert value is not None
    return value
