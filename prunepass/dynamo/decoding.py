"""The options ``decode`` and ``later_turns``: what becomes of a prompt's graph, and of graphs that go on from its
cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prunepass.errors import RefusalError
from prunepass.generation.decode import Decode
from prunepass.generation.follow import LaterCall, after_later_call, after_prompt, check_scorers, later_call
from prunepass.graph.inputs import fake_value
from prunepass.graph.streams import find_inputs
from prunepass.passes.cached import goes_on_from_cache
from prunepass.passes.past import PutBackPast, refuse_later_turns, refuse_spelled_out, take_out_past
from prunepass.passes.result import PruneResult
from prunepass.passes.scores import Returned, ReturnScores
from prunepass.pipeline import prune_graph
from prunepass.plan import Protect, PrunePlan
from prunepass.plan.draft import prunes

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from prunepass.passes.contract import Pass
    from prunepass.plan.draft import Planned

__all__ = ["Following"]


class Following:
    """One graph of a model whose later calls are looked at, too.

    Args:
        decode: how caches are cut while tokens are generated; None where they are not.
        later_turns: whether later calls of several tokens are pruned.
    """

    def __init__(self, decode: Decode | None, later_turns: bool) -> None:
        self._decode, self._later_turns = decode, later_turns
        self._found = Returned()
        self._call: LaterCall | None = None
        self._protect = Protect()
        self._before: list[int] = []

    def prune(self, gm: GraphModule, plan: Planned) -> PruneResult:
        """Prune the ATen graph of a prompt, or read, or prune, that of a later call.

        Raises:
            OptionError: the plan's scorers cannot score a new token.
            RefusalError: no cache of the model can be cut; and as `pipeline.prune_graph` and `take_out_past`.
        """
        if self._decode is not None:
            check_scorers(plan)
        inputs = find_inputs(gm)
        length = fake_value(inputs.tokens).shape[1]
        one, later = isinstance(length, int) and length == 1, goes_on_from_cache(gm)
        extra: list[Pass] = [ReturnScores(self._found)] if self._decode is not None else []
        if later and not one and self._later_turns and prunes(plan):
            past = take_out_past(gm)
            extra.append(PutBackPast(past))
            result = self._pruned(prune_graph(gm, plan, copy=False, extra=extra, fewer_queries=False))
            self._before = [past.inputs[level] for level in range(1, len(result.sites) + 1) if level in past.inputs]
            return result
        if (one or later) and self._decode is not None:
            self._call = later_call(gm, plan)
            given = plan if isinstance(plan, PrunePlan) else plan.completed(PrunePlan(()))
            return PruneResult(self._call.graph_module, given, "gather", inputs)
        return self._pruned(prune_graph(gm, plan, copy=False, exact=True, extra=extra))

    def of(self, lowered: Callable[..., Any], *, dense: bool) -> Callable[..., Any]:
        """What runs in place of the lowered graph."""
        if self._decode is None:
            return lowered
        if self._call is not None:
            return after_later_call(lowered, self._call, self._decode, dense=dense)
        if not any(self._found.caches):
            return lowered
        return after_prompt(lowered, self._found, self._protect, self._decode, self._before, dense=dense)

    def _pruned(self, result: PruneResult) -> PruneResult:
        self._protect = result.plan.protect
        if self._later_turns and result.returns_caches:
            refuse_later_turns(result)
        if self._decode is not None and result.returns_caches:
            refuse_spelled_out(result, "decode")
        if self._decode is not None and result.returns_caches and not any(self._found.caches):
            raise RefusalError(
                "the option 'decode' cuts caches of pruned layers that attend to the whole text, and in this model "
                "each pruned layer attends in a window: its cache is as long as the window, whatever is cut.",
                hint="Leave 'decode' out, or prune layers of full attention.",
            )
        return result
