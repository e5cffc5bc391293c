"""How near two tokens' scores came where a stage chose between them, read off the graph in mask mode.

Two correct computations that round otherwise may choose otherwise there. Such rows are told by the gap of the scores
and left out; the tolerance of what is compared stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from prunepass.pipeline import PruneResult

__all__ = ["Choices"]


class Choices:
    """The scores and the choice of every stage.

    Args:
        masked: a graph in mask mode.
    """

    def __init__(self, masked: PruneResult) -> None:
        gm = masked.graph_module
        graph, copies = fx.Graph(), {}
        graph.graph_copy(gm.graph, copies)
        by_name = {old.name: new for old, new in copies.items()}
        live = masked.live
        wanted = []
        for site in masked.sites:
            assert site.scores is not None
            assert site.kept is not None
            assert site.kept.alive is not None
            names = site.scores.name, site.kept.alive.name
            if all(name in by_name for name in names):  # else nothing hangs on the choice, and cleanup dropped it
                wanted += [by_name[name] for name in names]
        assert live is not None
        first = [by_name.get(n.name) if n is not None else None for n in (live.alive, live.protected)]
        graph.output((tuple(wanted), tuple(first)))
        self._names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        self._run = fx.Interpreter(fx.GraphModule(gm, graph))

    def gaps(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[B] float64: the smallest gap of a stage between the worst token kept and the best one dropped, as a share of
        the row's largest score; infinity where no stage had to choose by scores."""
        with torch.no_grad():
            stages, (alive, protected) = self._run.run(
                *(inputs[name] for name in self._names), enable_io_processing=False
            )
        rows = next(iter(inputs.values())).shape[:1]
        if not stages:
            return torch.full(rows, torch.inf, dtype=torch.float64)
        before = torch.ones(stages[1].shape, dtype=torch.bool) if alive is None else alive
        free = torch.ones_like(before) if protected is None else protected == 0
        smallest = torch.full(rows, torch.inf, dtype=torch.float64)
        for scores, after in zip(stages[::2], stages[1::2], strict=True):
            values = scores.double()
            kept, dropped = before & after & free, before & ~after & free
            lowest = torch.where(kept, values, torch.inf).amin(1)
            highest = torch.where(dropped, values, -torch.inf).amax(1)
            size = torch.where(before, values.abs(), 0).amax(1).clamp(min=1e-300)
            smallest = torch.minimum(smallest, (lowest - highest) / size)
            before = after
        return smallest
