"""Plans that meet a budget of FLOPs, the tokens that reach each block, and the FLOPs they really take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from prunepass import PrunePlan
from prunepass.cost import FlopCounter
from prunepass.cost.blocks import BlockCosts
from prunepass.errors import OptionError
from prunepass.graph.capture import capture_module
from prunepass.pipeline import prune_graph
from prunepass.plan import ScorerSpec, kept_count
from prunepass.training.methods.schedules import spread

#: an MLP predictor is this many times narrower than the model
_NARROWER = 10


class Planner:
    """Makes plans for one model and counts their FLOPs, both read off its graph.

    Args:
        example: inputs of the model, [batch, length]; any sizes.
        scorer: by name; "mlp" gets random weights, a tenth as wide as the model.
        stages: how many to place; see `places`.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor], scorer: str, stages: int) -> None:
        config: Any = model.config
        self.scorer, self.stages, self.width = scorer, stages, int(config.hidden_size)
        self.graph_module = capture_module(model, example).graph_module
        self.costs = BlockCosts.of(self.graph_module, scorer=scorer, hidden=self._hidden)
        self.counter = FlopCounter(self.graph_module)

    @property
    def _hidden(self) -> int:
        return max(1, self.width // _NARROWER)

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return self.costs.num_blocks

    def plan(self, budget: Fraction, lengths: Sequence[int]) -> PrunePlan:
        """A geometric schedule that costs the share ``budget`` of the dense FLOPs over rows of these ``lengths``.

        Raises:
            OptionError: the budget cannot be met.
        """
        layers = places(self.blocks, budget, self.stages, from_start=self.scorer != "attention")
        stages = spread(float(budget), self.costs, lengths=lengths, layers=layers)
        return PrunePlan(stages, ScorerSpec(self.scorer), weights=self._weights(len(stages)))

    def pruned(self, plan: PrunePlan) -> FlopCounter:
        """Counts the pruned model's FLOPs at any batch and length, scoring included."""
        return FlopCounter(prune_graph(self.graph_module, plan, metadata=False).graph_module)

    def _weights(self, stages: int) -> dict[str, Tensor]:
        if self.scorer != "mlp":
            return {}
        generator = torch.Generator().manual_seed(0)
        shapes = {"fc1.weight": (self._hidden, self.width), "fc1.bias": (self._hidden,)}
        shapes |= {"fc2.weight": (1, self._hidden), "fc2.bias": (1,)}
        return {
            f"stages.{i}.{name}": torch.randn(shape, generator=generator)
            for i in range(stages)
            for name, shape in shapes.items()
        }


def places(blocks: int, budget: Fraction, stages: int, *, from_start: bool = True) -> list[int]:
    """Blocks that stages stand before, evenly over the depth, the first of them as early as the budget asks.

    That is block 1. Where block 0 on all tokens would take more than half of the budget, it is block 0: what is left
    for the others would be a handful of tokens, which nobody prunes to.

    Args:
        stages: how many; 0, or more than there are blocks, means one before every block.
        from_start: whether the scorer can stand before block 0; one that reads attention cannot.
    """
    if stages < 0:
        raise OptionError(f"The number of stages must be at least 0, not {stages}.")
    first = 0 if from_start and budget * blocks < 2 else 1
    count = min(stages or blocks, blocks - first)
    return [first + i * (blocks - first) // count for i in range(count)]


def block_lengths(plan: PrunePlan, blocks: int, length: int) -> list[int]:
    """Tokens that each block runs on, where all ``length`` of a row are live."""
    counts = []
    for block in range(blocks):
        keeps = [stage.keep for stage in plan.stages if stage.layer <= block]
        counts.append(int(kept_count(length, keeps[-1], plan.protect)) if keeps else length)
    return counts
