"""The graphs of a student and its teacher: made when first needed, dropped when the model moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.plan import Protect, PrunePlan
from prunepass.scorers import Scorer
from prunepass.training.methods.gating import Gate
from prunepass.training.methods.graphs import Gated, Pruned, TrainingGraphs, Watched

__all__ = ["Forms"]

T = TypeVar("T")
_STUDENT, _TEACHER = "student", "teacher"


class Forms:
    """One model in the forms that training runs: dense and watched, with gates, or pruned as deployed.

    Graphs are traced after the Trainer has put the model where it computes. The teacher is made with them, before the
    model's weights change.

    Args:
        model: the student's; shared, not copied.
        example_inputs: to trace with.
        teacher: to learn from. Where left out a frozen copy of ``model``, or with ``frozen`` the model itself.
        first_cut: the first block before which tokens may leave.

    Attributes:
        num_blocks, width: of the model.
        cuts: the blocks before which tokens may leave.
        graph: the dense model's, as it was first traced.
        teacher_given: whether the teacher is another model, whose states lie in directions of their own.

    Raises:
        CaptureError, RefusalError: the model cannot be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Mapping[str, Tensor],
        teacher: nn.Module | None = None,
        *,
        frozen: bool,
        first_cut: int,
    ) -> None:
        self._model, self._example, self._given = model, dict(example_inputs), teacher
        self._frozen = frozen
        first = TrainingGraphs(model, self._example)
        self.num_blocks, self.width, self.graph = len(first.blocks), first.width, first.captured.graph_module
        self.cuts = tuple(range(first_cut, self.num_blocks))
        self.teacher_given = teacher is not None
        self._made: dict[Any, Any] = {_STUDENT: first}
        self._device = next(model.parameters()).device

    def protecting(self, protect: Protect, *, reads_one: bool) -> Protect:
        """See `TrainingGraphs.protecting`."""
        student: TrainingGraphs = self._made[_STUDENT]
        return student.protecting(protect, reads_one=reads_one)

    @property
    def graphs(self) -> TrainingGraphs:
        """The student's graphs, on the device it is on now."""
        device = next(self._model.parameters()).device
        if self._device != device:
            self._made = {_STUDENT: TrainingGraphs(self._model, self._on(device))}
            self._device = device
        if _TEACHER not in self._made:
            self._made[_TEACHER] = self._new_teacher(device)
        found: TrainingGraphs = self._made[_STUDENT]
        return found

    def once(self, key: Any, make: Callable[[TrainingGraphs], T]) -> T:
        """What ``make`` gives, made once for each key."""
        graphs = self.graphs  # drops those of another device
        if key not in self._made:
            self._made[key] = make(graphs)
        made: T = self._made[key]
        return made

    def teacher(self) -> Watched:
        """The frozen dense model, with taps on the stream from the first cut to the end, and on the last block's
        attention."""

        def make(_: TrainingGraphs) -> Watched:
            graphs: TrainingGraphs = self._made[_TEACHER]
            return graphs.watched(hidden=range(self.cuts[0], self.num_blocks + 1), attention=[self.num_blocks - 1])

        return self.once("watched", make)

    def dense(self) -> Watched:
        """The student itself, unpruned, with taps at the cuts."""
        return self.once("dense", lambda graphs: graphs.watched(hidden=self.cuts))

    def pruned(self, plan: PrunePlan, scorers: Mapping[int, Scorer] | None) -> Pruned:
        """The deployed form under a plan."""
        key = ("pruned", plan.stages, plan.protect)
        return self.once(key, lambda graphs: graphs.pruned_and_watched(plan, scorers))

    def gated(
        self, plan: PrunePlan, gates: Callable[[], Sequence[Gate]], scorers: Mapping[int, Scorer] | None
    ) -> Gated:
        """Mask mode, with ``gates()`` that choose in place of the top scores."""
        key = ("gated", plan.stages, plan.protect)
        return self.once(key, lambda graphs: graphs.gated(plan, gates(), scorers))

    def forget_plans(self) -> None:
        """Drop the graphs that belong to plans, after these were replaced."""
        for key in [k for k in self._made if isinstance(k, tuple)]:
            del self._made[key]

    def _new_teacher(self, device: torch.device) -> TrainingGraphs:
        if self._frozen and self._given is None:
            own: TrainingGraphs = self._made[_STUDENT]
            return own
        teacher = self._given or copy.deepcopy(self._model)
        teacher.to(device).eval().requires_grad_(False)
        graphs = TrainingGraphs(teacher, self._on(device))
        if (len(graphs.blocks), graphs.width) != (self.num_blocks, self.width):
            raise OptionError(
                f"The teacher has {len(graphs.blocks)} blocks of width {graphs.width}, the model {self.num_blocks} of "
                f"{self.width}; tokens are ranked block by block, so the two must be of one shape."
            )
        return graphs

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in self._example.items()}
