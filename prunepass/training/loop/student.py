"""The module that the Trainer trains: the user's model, its predictors and gates, and the loss of each phase."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunepass.cost.model import CostModel
from prunepass.errors import OptionError
from prunepass.passes.live import LiveTokens, live_tokens
from prunepass.passes.segments import TYPES_NAME
from prunepass.plan import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.scorers import ScoreInputs
from prunepass.scorers.lens import Lens
from prunepass.scorers.mlp import MlpScorer
from prunepass.training.data.distances import live, mean_by_row, wide
from prunepass.training.data.heads import Head
from prunepass.training.loop.config import PruneConfig
from prunepass.training.methods import ranking
from prunepass.training.methods.budget import Constraint, expected_cost
from prunepass.training.methods.forms import Forms
from prunepass.training.methods.gates import PruneGates
from prunepass.training.methods.gating import RankGate, TopGate
from prunepass.training.methods.graphs import Gated, Pruned, let_go
from prunepass.training.methods.lenses import fit_lenses
from prunepass.training.methods.saliency import confidence, saliency

__all__ = ["Phase", "Student"]

_HALF = Fraction(1, 2)


class Phase(enum.Enum):
    """What is being learned; see `PruneConfig`."""

    RANK = "rank"
    SELECT = "select"
    ADAPT = "adapt"


class Student(nn.Module):
    """A model on its way to being pruned.

    Graphs and the teacher are made when first needed (`training.forms`); they are no part of the module's state.

    Args:
        model: the user's. Trained in place, unless the configuration freezes it.
        head: what the model's head predicts.
        config: how to train.
        example_inputs: to trace with.
        teacher: to learn from; a copy of ``model`` where left out.

    Attributes:
        forms: the model's graphs, and the teacher's.
        phase: which loss `forward` computes.
        plans: stages that training has come to, the goal's first, then those of the extra budgets.
        searches: how they were found, as JSON takes it.
        chosen: which of ``plans`` the next step trains, or evaluation runs.
        gates, constraint: see `add_gates`.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        config: PruneConfig,
        example_inputs: Mapping[str, Tensor],
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head, self.settings = model, head, config
        # attention can be read from block 1 on; a predictor can look at the embeddings, too
        first_cut = 0 if config.learns_predictors else 1
        self.forms = Forms(model, example_inputs, teacher, frozen=config.freeze_model, first_cut=first_cut)
        if head.makes_tokens:  # class and register tokens stay, as `prune` has it; the first patches say no more
            first = max(config.protect.first, self.forms.prefix)
            config = replace(config, protect=replace(config.protect, first=first), beginnings=())
            self.settings = config
        self.cuts, self.num_blocks, self.width = self.forms.cuts, self.forms.num_blocks, self.forms.width
        self.predictors = nn.ModuleDict()
        if config.learns_predictors:
            for cut in self.cuts:
                scorer = MlpScorer(self.width, config.predictor_width, positions=config.predictor_positions)
                self.predictors[str(cut)] = scorer
                if config.restore == "lens":
                    scorer.lens = Lens(self.width, min(config.lens_rank, self.width))
        self.gates: PruneGates | None = None
        self.constraint: Constraint | None = None
        _check_dtype(model)
        if config.freeze_model:
            model.requires_grad_(False)
        self.phase = Phase.RANK
        self.plans: list[PrunePlan] = []
        self.chosen = 0
        self.searches: list[dict[str, Any]] = []
        self._costs: CostModel | None = None
        self.progress = 0.0
        self.read_off: dict[str, list[Stage]] = {}  # by extra budget, stages that gates passed through on their way
        self.draws: torch.Generator | None = None  # of gates, the same in all processes
        self.ranks = True  # whether the next step has the ranking loss among its own
        self.watches = False  # whether the next step is logged
        self.logged: dict[str, float] = {}

    def add_gates(self, budget: float, costs: CostModel) -> None:
        """Gates at all cuts, held to a cost share of ``budget``, where the configuration searches by gates."""
        if self.settings.plan is not None or self.settings.searches_by != "gates":
            return
        self.gates = PruneGates(len(self.cuts), self.settings.bins, gate_init=self.settings.gate_init)
        self.constraint = Constraint(budget, warmup=self.settings.warmup)
        self._costs = costs

    # -- plans ---------------------------------------------------------------------------------------------------

    def scorers(self, plan: PrunePlan) -> dict[int, MlpScorer] | None:
        """The shared predictors of a plan's stages, by stage."""
        if not self.predictors:
            return None
        return {i: self._predictor(stage.layer) for i, stage in enumerate(plan.stages)}

    def pruned(self, plan: PrunePlan) -> Pruned:
        """The deployed form under a plan."""
        return self.forms.pruned(plan, self.scorers(plan))

    def _gated(self) -> Gated:
        """Mask mode with gates at all cuts, or with those of the chosen plan."""
        if self.gates is not None:
            plan = _dropping(self.plan_of([Stage(cut, _HALF) for cut in self.cuts]))
            return self.forms.gated(plan, lambda: [RankGate(i) for i in range(len(self.cuts))], self.scorers(plan))
        plan, noise = _dropping(self.plans[self.chosen]), self.settings.noise

        def gates() -> list[TopGate]:
            return [TopGate(stage, plan.protect, noise=noise) for stage in plan.stages]

        return self.forms.gated(plan, gates, self.scorers(plan))

    def plan_of(self, stages: Sequence[Stage]) -> PrunePlan:
        """A plan with these stages and the configuration's scorer, protection and outputs; without weights."""
        scorer = ScorerSpec("mlp") if self.predictors else self.settings.ranker
        leaving = tuple(replace(stage, leave=self.settings.leave) for stage in stages)
        return PrunePlan(leaving, scorer, self.settings.protect, self.settings.restore)

    def fixed_plan(self) -> PrunePlan:
        """The configuration's plan with its stages as they are, without those that keep everything."""
        assert self.settings.plan is not None
        stages = tuple(stage for stage in self.settings.plan.stages if stage.keep < 1)
        return replace(self.plan_of(()), stages=stages)

    def all_predictors(self) -> PrunePlan | None:
        """The predictors of all cuts as a plan that keeps every token: to search with again (`prunepass search`)."""
        if not self.predictors:
            return None
        return self._with_weights(self.plan_of([Stage(cut, Fraction(1)) for cut in self.cuts]))

    def trained_plan(self, index: int = 0) -> PrunePlan:
        """One of ``plans`` with its predictors' weights: what is saved and deployed."""
        return self._with_weights(self.plans[index])

    def _with_weights(self, plan: PrunePlan) -> PrunePlan:
        weights = {
            f"stages.{i}.{name}": value.detach().to("cpu", copy=True)
            for i, scorer in (self.scorers(plan) or {}).items()
            for name, value in scorer.state_dict().items()
        }
        return replace(plan, weights=weights)

    # -- losses --------------------------------------------------------------------------------------------------

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """In training, ``{"loss": scalar}`` of the phase. In evaluation, the outputs of the pruned model (of the dense
        one while there is no plan), and its loss on labels or, where there are none, its divergence from the teacher.
        """
        if not self.training:
            return self._evaluated(batch)
        self.logged = {}
        step = {Phase.RANK: self._rank, Phase.SELECT: self._select, Phase.ADAPT: self._adapt}[self.phase]
        loss = step(batch)
        self.logged["loss_" + self.phase.value] = loss.detach().item()
        return {"loss": loss}

    def _evaluated(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        inputs = self.head.model_inputs(batch)
        module = self.pruned(self.plans[self.chosen]).module if self.plans else self.model
        outputs = module(**inputs)
        if self.head.has_labels(batch):
            loss = self.head.task_loss(outputs, batch)
        else:
            answers = self.forms.teacher().module(**inputs)
            loss = self.head.divergence(outputs, answers, batch).mean()
            let_go(self.forms.teacher().module)
        let_go(module)
        return {"loss": loss, **{k: v for k, v in outputs.items() if isinstance(v, Tensor)}}

    def _rank(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Predictors at all cuts learn from the dense model; its own weights rest, so it is its own teacher."""
        targets, hidden, _ = self._teach(batch, needs_hidden=True)
        if self.forms.teacher_given:
            hidden = self._own_hidden(batch)
        ranked = _rankable(batch, self.settings.protect)
        live = _live(batch, self.settings.protect)
        inputs = {cut: ScoreInputs(hidden[cut], live.alive, live.rank, end=live.end) for cut in self.cuts}
        losses = [
            self._ranking(self._predictor(cut).score(inputs[cut]), targets[cut], ranked, f"{cut}") for cut in self.cuts
        ]
        return torch.stack(losses).mean()

    def fit_lenses(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Weights of the lenses of all cuts, from the dense model's states; see `load_lenses`."""
        late = self.forms.teacher()
        early = self.forms.dense() if self.forms.teacher_given else late
        for tap in late.hidden.values():
            tap.leaf = False
        rank = self.settings.lens_rank
        fitted = fit_lenses(early, late, self.head, batches, cuts=self.cuts, end=self.num_blocks, rank=rank)
        let_go(late.module)
        let_go(early.module)
        return {cut: lens.state_dict() for cut, lens in fitted.items()}

    def load_lenses(self, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over what `fit_lenses` gave."""
        for cut, state in weights.items():
            lens = self._predictor(cut).lens
            assert lens is not None
            lens.load_state_dict(state)

    @torch.no_grad()
    def _own_hidden(self, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
        watched = self.forms.dense()
        watched.module(**self.head.model_inputs(batch))
        return {cut: tap.take() for cut, tap in watched.hidden.items()}

    def _select(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Through soft choices: distillation, ranking, and where gates are learned the constraint on cost."""
        targets, _, answers = self._teach(batch, ranks=self.ranks)
        inputs = self.head.model_inputs(batch)
        gated = self._gated()
        if self.gates is not None:
            drawn = self.gates(self.draws)  # one draw a step, shared by the batch and by all processes
            for gate in gated.gates:
                assert isinstance(gate, RankGate)
                gate.sample = drawn
        loss = self._answers(gated.module(**inputs), answers, batch)
        free = _rankable(batch, self.settings.protect if self.gates is not None else self.plans[self.chosen].protect)
        weight = self.settings.rank_weight
        if self.gates is not None:
            weight *= max(0.01, 1 - self.progress)
        elif self.settings.method == "sdtp":
            weight = 1.0  # its eq. 8 adds the losses as they are
        terms = []
        for gate, cut in zip(gated.gates, self._gate_cuts(), strict=True):
            if not targets or not self._ranks_at(cut):
                continue
            terms.append(self._ranking(gate.scores, targets[cut], gate.ranked & free, f"{cut}"))
        if terms:
            loss = loss + weight * torch.stack(terms).mean()
        if self.gates is not None:
            loss = loss + self._constraint(batch)
        return loss

    def _adapt(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As deployed: tokens are really gone, and the ranking is learned on those that are left."""
        plan = self.plans[self.chosen]
        pruned = self.pruned(plan)
        targets, hidden, answers = self._teach(batch, ranks=self.ranks, needs_hidden=self._likens)
        loss = self._answers(pruned.module(**self.head.model_inputs(batch)), answers, batch)
        if self._likens and plan.stages:
            loss = loss + self.settings.likens_by * self._unlikeness(pruned, hidden)
        terms = []
        for i, stage in enumerate(plan.stages):
            scores, positions, alive = (
                tap.take() if tap else None for tap in (pruned.scores[i], pruned.positions[i], pruned.alive[i])
            )
            assert scores is not None
            if not targets or not self._ranks_at(stage.layer):
                continue
            ranked, target = _rankable(batch, plan.protect), targets[stage.layer]
            if positions is not None:
                ranked, target = ranked.gather(1, positions), target.gather(1, positions)
            terms.append(
                self._ranking(scores, target, ranked & alive if alive is not None else ranked, f"{stage.layer}")
            )
        if terms:
            loss = loss + self.settings.rank_weight * torch.stack(terms).mean()
        return loss

    # -- parts of losses -----------------------------------------------------------------------------------------

    def _teach(
        self, batch: Mapping[str, Tensor], ranks: bool = True, needs_hidden: bool = False
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Any]:
        """Importance by cut ([B, S]; empty unless ``ranks``), hidden states by block where asked for, and the dense
        model's outputs."""
        watched = self.forms.teacher()
        by_gradient = ranks and self.settings.ranks_by == "saliency"
        for cut, tap in watched.hidden.items():
            tap.leaf = by_gradient and cut == self.cuts[0]
        with torch.set_grad_enabled(by_gradient):
            answers = watched.module(**self.head.model_inputs(batch))
        hidden = {cut: tap.take() for cut, tap in watched.hidden.items()}
        attention = watched.attention[self.num_blocks - 1].take()
        targets: dict[int, Tensor] = {}
        if by_gradient:
            target = confidence(answers, batch, self.head.salient(batch))
            labels = saliency(target, [hidden[c] for c in self.cuts], self.settings.saliency)
            targets = dict(zip(self.cuts, labels, strict=True))
        elif ranks:
            targets = dict.fromkeys(range(self.num_blocks), attention)  # a fixed plan may stand above the cuts
        return targets, {c: h.detach() for c, h in hidden.items()} if needs_hidden else {}, _detached(answers)

    @property
    def _likens(self) -> bool:
        """Whether states are compared: another model's lie in directions of their own."""
        return self.settings.likens_by > 0 and not self.forms.teacher_given

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
        self.logged["loss_hidden"] = float(distance.detach())
        return distance

    def _predictor(self, cut: int) -> MlpScorer:
        scorer = self.predictors[str(cut)]
        assert isinstance(scorer, MlpScorer)
        return scorer

    def _answers(self, outputs: Any, answers: Any, batch: Mapping[str, Tensor]) -> Tensor:
        loss = self.head.distillation(outputs, answers, batch, self.settings.temperature)
        self.logged["loss_distillation"] = float(loss.detach())
        if self.settings.task_weight and self.head.has_labels(batch):
            loss = loss + self.settings.task_weight * self.head.task_loss(outputs, batch)
        return loss

    def _ranking(self, scores: Tensor, targets: Tensor, ranked: Tensor, name: str) -> Tensor:
        settings = self.settings
        scores = scores.float()
        if self.watches:
            few = slice(4)  # tau costs the square of the length
            self.logged[f"tau_{name}"] = float(ranking.kendall_tau(scores[few].detach(), targets[few], ranked[few]))
        if not self.predictors:
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

    def _ranks_at(self, cut: int) -> bool:
        """ToP distils its ranking into the first third of the layers; a predictor is taught wherever it stands."""
        return bool(self.predictors) or (
            self.settings.ranker.name == "attention" and cut <= max(1, self.num_blocks // 3)
        )

    def _gate_cuts(self) -> tuple[int, ...]:
        return self.cuts if self.gates is not None else tuple(s.layer for s in self.plans[self.chosen].stages)

    def _constraint(self, batch: Mapping[str, Tensor]) -> Tensor:
        assert self.gates is not None
        assert self.constraint is not None
        assert self._costs is not None
        lengths = live(batch).sum(1)
        cost = expected_cost(
            self.gates.expected_keep(),
            lengths,
            self.cuts,
            self._costs,
            stages=self.gates.stage_probability(),
            minimum=self.settings.protect.first + self.settings.protect.last,
        )
        self.logged["cost_share"] = float(cost.detach())
        penalty: Tensor = self.constraint(cost, self.progress)
        return penalty


def _dropping(plan: PrunePlan) -> PrunePlan:
    """The plan with tokens that leave for good: one that is partly there cannot be partly elsewhere as well."""
    return replace(plan, stages=tuple(replace(stage, leave="drop") for stage in plan.stages))


def _rankable(batch: Mapping[str, Tensor], protect: Protect) -> Tensor:
    """[B, S] bool: the tokens that compete, live and not protected."""
    live = _live(batch, protect)
    free = live.protected == 0
    return free if live.alive is None else free & live.alive


def _live(batch: Mapping[str, Tensor], protect: Protect) -> LiveTokens:
    """`live_tokens` of a batch."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    tokens = mask if ids is None else ids  # of images and sound there are no ids
    assert tokens is not None
    return live_tokens(tokens, mask, ids, protect, batch.get(TYPES_NAME))


def _check_dtype(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    if dtype in (torch.bfloat16, torch.float16):
        raise OptionError(
            f"The model's weights are {str(dtype).removeprefix('torch.')}, too coarse for an optimiser's small steps. "
            "Load it with dtype=torch.float32, and set bf16=True in the TrainingArguments to compute in half precision."
        )


def _detached(outputs: Any) -> Any:
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            outputs[name] = value.detach()
    return outputs
