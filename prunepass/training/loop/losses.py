"""The loss of each phase: the ranking, soft choices, and the model as it is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepass.plan import PrunePlan
from prunepass.scorers import ScoreInputs
from prunepass.training.data.distances import mean_by_row, wide
from prunepass.training.data.heads import Head
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.predictors import Predictors
from prunepass.training.loop.teaching import Taught, competing, live_of, own_hidden, teach
from prunepass.training.methods import ranking
from prunepass.training.methods.forms import Forms
from prunepass.training.methods.gate_search import GateSearch
from prunepass.training.methods.gating import Gate, TopGate
from prunepass.training.methods.graphs import Pruned

__all__ = ["Losses", "Step"]


@dataclass
class Step:
    """What the next step of training is told, and what it tells.

    Attributes:
        progress: share of the selecting phase that is done, in [0, 1].
        draws: draws gates, the same in all processes.
        ranks: whether the ranking loss is among the step's own.
        watches: whether the step is logged.
        logged: figures of the last step, by name.
    """

    progress: float = 0.0
    draws: torch.Generator | None = None
    ranks: bool = True
    watches: bool = False
    logged: dict[str, float] = field(default_factory=dict)


class Losses:
    """Scalars to be minimised, one method a phase.

    Args:
        forms: the graphs of the student and its teacher.
        predictors: empty where tokens are ranked by a scorer without weights.
        step: read before each loss, and told its parts.
    """

    def __init__(self, forms: Forms, head: Head, settings: PruneConfig, predictors: Predictors, step: Step) -> None:
        self._forms, self._head, self._settings = forms, head, settings
        self._predictors, self._step = predictors, step

    def rank(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Predictors at all cuts learn from the dense model; its own weights rest, so it is its own teacher."""
        forms, protect = self._forms, self._settings.protect
        taught = self._teach(batch, needs_hidden=True)
        hidden = own_hidden(forms, self._head, batch) if forms.teacher_given else taught.hidden
        free, live = competing(batch, protect), live_of(batch, protect)
        losses = []
        for cut in forms.cuts:
            scores = self._predictors.at(cut).score(ScoreInputs(hidden[cut], live.alive, live.rank, end=live.end))
            losses.append(self._ranking(scores, taught.importance[cut], free, cut))
        return torch.stack(losses).mean()

    def select(self, batch: Mapping[str, Tensor], plan: PrunePlan, search: GateSearch | None = None) -> Tensor:
        """Through soft choices: distillation, ranking, and where gates are learned the constraint on cost.

        Args:
            plan: the stages that choose.
            search: whose gates choose; where left out the top scores do.
        """
        settings = self._settings
        taught = self._teach(batch, ranks=self._step.ranks)
        inputs = self._head.model_inputs(batch)

        def gates() -> list[Gate]:
            if search is not None:
                return [*search.new_gates()]
            return [TopGate(stage, plan.protect, noise=settings.noise) for stage in plan.stages]

        gated = self._forms.gated(_dropping(plan), gates, self._predictors.of(plan))
        if search is not None:
            search.draw(gated.gates, self._step.draws)
        loss = self._answers(gated.module(**inputs), taught.answers, batch)
        free = competing(batch, plan.protect)
        terms = [
            self._ranking(gate.scores, taught.importance[stage.layer], gate.ranked & free, stage.layer)
            for gate, stage in zip(gated.gates, plan.stages, strict=True)
            if taught.importance and self._ranks_at(stage.layer)
        ]
        if terms:
            loss = loss + self._rank_weight(search is not None) * torch.stack(terms).mean()
        if search is not None:
            cost = search.cost(batch)
            self._step.logged["cost_share"] = float(cost.detach())
            loss = loss + search.penalty(cost, self._step.progress)
        return loss

    def adapt(self, batch: Mapping[str, Tensor], plan: PrunePlan, pruned: Pruned) -> Tensor:
        """As deployed: tokens are really gone, and the ranking is learned on those that are left.

        Args:
            pruned: the deployed form under ``plan``.
        """
        taught = self._teach(batch, ranks=self._step.ranks, needs_hidden=self._likens)
        loss = self._answers(pruned.module(**self._head.model_inputs(batch)), taught.answers, batch)
        if self._likens and plan.stages:
            loss = loss + self._settings.likens_by * self._unlikeness(pruned, taught.hidden)
        free, terms = competing(batch, plan.protect), []
        for i, stage in enumerate(plan.stages):
            scores, positions, alive = (
                tap.take() if tap else None for tap in (pruned.scores[i], pruned.positions[i], pruned.alive[i])
            )
            assert scores is not None
            if not taught.importance or not self._ranks_at(stage.layer):
                continue
            ranked, target = free, taught.importance[stage.layer]
            if positions is not None:
                ranked, target = ranked.gather(1, positions), target.gather(1, positions)
            if alive is not None:
                ranked = ranked & alive
            terms.append(self._ranking(scores, target, ranked, stage.layer))
        if terms:
            loss = loss + self._settings.rank_weight * torch.stack(terms).mean()
        return loss

    # -- parts ---------------------------------------------------------------------------------------------------

    def _teach(self, batch: Mapping[str, Tensor], *, ranks: bool = True, needs_hidden: bool = False) -> Taught:
        return teach(self._forms, self._head, self._settings, batch, ranks=ranks, needs_hidden=needs_hidden)

    def _answers(self, outputs: Any, answers: Any, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self._head.distillation(outputs, answers, batch, self._settings.temperature)
        self._step.logged["loss_distillation"] = float(loss.detach())
        if self._settings.task_weight and self._head.has_labels(batch):
            loss = loss + self._settings.task_weight * self._head.task_loss(outputs, batch)
        return loss

    def _ranking(self, scores: Tensor, targets: Tensor, ranked: Tensor, cut: int) -> Tensor:
        """How far the order of ``scores`` is from that of ``targets``, [B, S] each, among the tokens ``ranked``."""
        settings = self._settings
        scores = scores.float()
        if self._step.watches:
            few = slice(4)  # tau costs the square of the length
            tau = ranking.kendall_tau(scores[few].detach(), targets[few], ranked[few])
            self._step.logged[f"tau_{cut}"] = float(tau)
        if not self._predictors:
            scores = ranking.standardise(scores, ranked)
        if settings.ranks_with == "arp2":
            loss = ranking.lambda_arp2(scores, targets, ranked, top_k=settings.ranking_top)
        elif settings.ranks_with == "ndcg2":
            loss = ranking.lambda_ndcg2(scores, targets, ranked, top_k=settings.ranking_top)
        else:
            loss = ranking.pairwise_logistic(scores, targets, ranked, pairs=1024)
        if settings.method == "sdtp":
            loss = loss + ranking.standardised_mse(scores, targets, ranked)
        return loss

    def _rank_weight(self, searches: bool) -> float:
        if searches:
            return self._settings.rank_weight * max(0.01, 1 - self._step.progress)
        return 1.0 if self._settings.method == "sdtp" else self._settings.rank_weight  # its eq. 8 adds them as they are

    def _ranks_at(self, cut: int) -> bool:
        """ToP distils its ranking into the first third of the layers; a predictor is taught wherever it stands."""
        first_third = cut <= max(1, self._forms.num_blocks // 3)
        return bool(self._predictors) or (self._settings.ranker.name == "attention" and first_third)

    @property
    def _likens(self) -> bool:
        """Whether states are compared: another model's lie in directions of their own."""
        return self._settings.likens_by > 0 and not self._forms.teacher_given

    def _unlikeness(self, pruned: Pruned, dense: Mapping[int, Tensor]) -> Tensor:
        """How far the states of kept tokens are from the dense model's: cosine distances, each row's mean alike."""
        distances = []
        for stream in pruned.hidden:
            state, at = stream.state.take(), stream.positions.value
            assert at is not None
            like = dense[stream.block].gather(1, at.unsqueeze(-1).expand(-1, -1, state.shape[-1]))
            distance = 1 - F.cosine_similarity(wide(state), wide(like), dim=-1)
            alive = torch.ones_like(at, dtype=torch.bool) if stream.alive is None else stream.alive.value
            assert alive is not None
            distances.append(mean_by_row(distance[alive], alive).mean())
        distance = torch.stack(distances).mean()
        self._step.logged["loss_hidden"] = float(distance.detach())
        return distance


def _dropping(plan: PrunePlan) -> PrunePlan:
    """The plan with tokens that leave for good: one that is partly there cannot be partly elsewhere as well."""
    return replace(plan, stages=tuple(replace(stage, leave="drop") for stage in plan.stages))
