"""What a graph costs: FLOPs from shapes, seconds from measurements; per node, per block, over a corpus of lengths."""

from prunepass.cost.corpus import CorpusFlops, corpus_flops
from prunepass.cost.flops import FlopCounter
from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts, plan_cost, plan_share

__all__ = ["CorpusFlops", "CostModel", "FlopCounter", "PlanCosts", "corpus_flops", "plan_cost", "plan_share"]
