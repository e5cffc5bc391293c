"""A graph without stages, less what is computed for tokens that no result needs."""

from __future__ import annotations

import logging

from torch.fx import GraphModule

from prunepass.errors import PruneError
from prunepass.graph.analysis import Analysis
from prunepass.graph.capture import ensure_aten
from prunepass.graph.inputs import TOKEN_SIZES, TokenSizes, fake_value
from prunepass.graph.prompts import take_prompt
from prunepass.graph.reasons import no_raw_errors
from prunepass.passes.cached import goes_on_from_cache
from prunepass.passes.cleanup import Cleanup
from prunepass.passes.hoist import HoistReads
from prunepass.passes.result import PruneResult
from prunepass.passes.runner import Hook, Runner
from prunepass.passes.state import Rewrite
from prunepass.plan import PrunePlan

__all__ = ["without_unread"]

logger = logging.getLogger("prunepass.pipeline")


def without_unread(
    gm: GraphModule,
    plan: PrunePlan,
    *,
    attentions: int = HoistReads.attentions,
    hook: Hook | None = None,
    metadata: bool = True,
) -> PruneResult | None:
    """What no result needs is left out of a copy of the graph; the values stay what they are.

    Args:
        gm: Dynamo's graph or ATen, as `pipeline.prune_graph` takes it; not edited.
        plan: one that prunes nothing; its stream is the one that is read.
        attentions: how many attentions must get fewer queries for anything to be done.
        hook, metadata: as `pipeline.prune_graph` takes them.

    Returns:
        None where there is nothing to leave out, or where the graph cannot be read.
    """
    try:
        with no_raw_errors():
            copy = ensure_aten(gm)
            take_prompt(copy)
            if goes_on_from_cache(copy):
                return None
            found = Analysis.of(copy, plan.stream)
    except PruneError as e:
        logger.debug("a graph without stages stays as it is: %s", e)
        return None
    runner = Runner(found.gm, hook)
    state = Rewrite(found.gm, plan, "gather", found.inputs, found.sizes, found.blocks, [])
    runner.run(HoistReads(attentions=attentions), state)
    if not runner.changes["hoist"]:
        return None
    runner.run(Cleanup(metadata), state)
    found.gm.meta[TOKEN_SIZES] = TokenSizes(
        (fake_value(found.inputs.rows).shape[0], fake_value(found.inputs.tokens).shape[1])
    )
    return PruneResult(
        found.gm, plan, "gather", found.inputs, found.blocks, changes=runner.changes, seconds=runner.seconds
    )
