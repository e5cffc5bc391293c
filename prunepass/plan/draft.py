"""A plan that waits for the model's graph: the default one, and the short form where it says nothing of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunepass.plan.annotations import Leave
from prunepass.plan.plan import PrunePlan

__all__ = ["Draft", "Planned", "Several", "prunes"]


@dataclass(frozen=True)
class Draft:
    """What is known of a plan before the model's blocks and head are; `passes.default_plan.settled` adds the rest.

    Attributes:
        given: fields of `PrunePlan` that are settled. The model says what the others are; without ``stages`` it is the
            default plan. Stages that are given prune.
        leave: how tokens leave in the default plan's stages, where that was said.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    leave: Leave | None = None

    def completed(self, default: PrunePlan) -> PrunePlan:
        """``default`` with what is given in place of its own."""
        plan = replace(default, **self.given)
        if self.leave is None:
            return plan
        return replace(plan, stages=tuple(replace(stage, leave=self.leave) for stage in plan.stages))

    @property
    def tokens_to_trace(self) -> int:
        """As `PrunePlan.tokens_to_trace`, of what is given."""
        return self.completed(PrunePlan(())).tokens_to_trace

    @property
    def stream(self) -> str | None:
        """Which residual stream, where it was said."""
        stream: str | None = self.given.get("stream")
        return stream


@dataclass(frozen=True)
class Several:
    """Plans of one program, of which each call takes one: the levels 1, 2, ..., besides level 0, which keeps all.

    `prunepass.plan.levels.Levels` is what becomes of them when the model is known.
    """

    plans: tuple[PrunePlan | Draft, ...]

    def completed(self, default: PrunePlan) -> PrunePlan:
        """Where nothing is pruned, at no level: ``default``."""
        return default

    @property
    def tokens_to_trace(self) -> int:
        """As `PrunePlan.tokens_to_trace`, for all of them."""
        return max(plan.tokens_to_trace for plan in self.plans)

    @property
    def stream(self) -> str | None:
        """Which residual stream; that they agree is checked when their stages are joined."""
        return self.plans[0].stream


#: what goes from the door to the pipeline
Planned = PrunePlan | Draft | Several


def prunes(plan: Planned) -> bool:
    """Whether some stage keeps less than all, so that the model has to be read."""
    return not isinstance(plan, PrunePlan) or any(stage.keep != 1 for stage in plan.stages)
