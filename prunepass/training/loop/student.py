"""The module that the Trainer trains: the user's model, its predictors and gates, and the plans that it has come to."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.cost.model import CostModel
from prunepass.errors import OptionError
from prunepass.plan import PrunePlan, ScorerSpec, Stage
from prunepass.scorers.mlp import MlpScorer
from prunepass.training.data.heads import Head
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.losses import Losses, Step
from prunepass.training.loop.predictors import Predictors, with_weights
from prunepass.training.methods.budget import Constraint
from prunepass.training.methods.forms import Forms
from prunepass.training.methods.gate_search import GateSearch
from prunepass.training.methods.gates import PruneGates
from prunepass.training.methods.graphs import Pruned, let_go
from prunepass.training.methods.lenses import fit_lenses

__all__ = ["Phase", "Student"]


class Phase(enum.Enum):
    """What is being learned; see `PruneConfig`."""

    RANK = "rank"
    SELECT = "select"
    ADAPT = "adapt"


class Student(nn.Module):
    """A model on its way to being pruned.

    Graphs and the teacher are made when first needed (`methods.forms`); they are no part of the module's state.

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
        step: what else the next step is told.
        validation: the rows that the best state is chosen by, in words; a checkpoint is gone on with by the same.
        predictors: at all cuts, where the configuration learns any.
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
        self.model, self.head = model, head
        # attention can be read from block 1 on; a predictor can look at the embeddings, too
        first_cut = 0 if config.learns_predictors else 1
        self.forms = Forms(model, example_inputs, teacher, frozen=config.freeze_model, first_cut=first_cut)
        reads_one = head.answers_once and config.plan is None  # a plan that was given protects what it says
        config = replace(config, protect=self.forms.protecting(config.protect, reads_one=reads_one))
        if head.makes_tokens:
            config = replace(config, beginnings=())  # the first patches say no more than others
        self.settings = config
        self.cuts, self.num_blocks, self.width = self.forms.cuts, self.forms.num_blocks, self.forms.width
        self.predictors = Predictors(self.cuts, self.width, config)
        self.gates: PruneGates | None = None
        self.constraint: Constraint | None = None
        _check_dtype(model)
        if config.freeze_model:
            model.requires_grad_(False)
        self.phase = Phase.RANK
        self.plans: list[PrunePlan] = []
        self.chosen = 0
        self.searches: list[dict[str, Any]] = []
        self.read_off: dict[str, list[Stage]] = {}  # by extra budget, stages that gates passed through on their way
        self.step = Step()
        self.validation: str | None = None
        self._losses = Losses(self.forms, head, self.settings, self.predictors, self.step)
        self._gate_search: GateSearch | None = None

    def add_gates(self, budget: float, costs: CostModel) -> None:
        """Gates at all cuts, held to a cost share of ``budget``, where the configuration searches by gates."""
        settings = self.settings
        if settings.plan is not None or settings.searches_by != "gates":
            return
        self.gates = PruneGates(len(self.cuts), settings.bins, gate_init=settings.gate_init)
        self.constraint = Constraint(budget, warmup=settings.warmup)
        least = settings.protect.first + settings.protect.last
        self._gate_search = GateSearch(self.gates, self.constraint, costs, self.cuts, least)

    # -- plans ---------------------------------------------------------------------------------------------------

    def scorers(self, plan: PrunePlan) -> dict[int, MlpScorer] | None:
        """The shared predictors of a plan's stages, by stage."""
        return self.predictors.of(plan)

    def pruned(self, plan: PrunePlan) -> Pruned:
        """The deployed form under a plan."""
        return self.forms.pruned(plan, self.scorers(plan))

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
        return with_weights(plan, self.scorers(plan) or {})

    # -- lenses --------------------------------------------------------------------------------------------------

    def fit_lenses(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Weights of the lenses of all cuts, from the dense model's states; see `Predictors.load_lenses`."""
        late = self.forms.teacher()
        early = self.forms.dense() if self.forms.teacher_given else late
        for tap in late.hidden.values():
            tap.leaf = False
        rank = self.settings.lens_rank
        fitted = fit_lenses(early, late, self.head, batches, cuts=self.cuts, end=self.num_blocks, rank=rank)
        let_go(late.module)
        let_go(early.module)
        return {cut: lens.state_dict() for cut, lens in fitted.items()}

    # -- runs ----------------------------------------------------------------------------------------------------

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """In training, ``{"loss": scalar}`` of the phase. In evaluation, the outputs of the pruned model (of the dense
        one while there is no plan), and its loss on labels or, where there are none, its divergence from the teacher.
        """
        if not self.training:
            return self._evaluated(batch)
        self.step.logged.clear()
        step = {Phase.RANK: self._losses.rank, Phase.SELECT: self._select, Phase.ADAPT: self._adapt}[self.phase]
        loss = step(batch)
        self.step.logged["loss_" + self.phase.value] = loss.detach().item()
        return {"loss": loss}

    def _select(self, batch: Mapping[str, Tensor]) -> Tensor:
        search = self._gate_search
        plan = self.plans[self.chosen] if search is None else self.plan_of(search.stages)
        return self._losses.select(batch, plan, search)

    def _adapt(self, batch: Mapping[str, Tensor]) -> Tensor:
        plan = self.plans[self.chosen]
        return self._losses.adapt(batch, plan, self.pruned(plan))

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


def _check_dtype(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    if dtype in (torch.bfloat16, torch.float16):
        raise OptionError(
            f"The model's weights are {str(dtype).removeprefix('torch.')}, too coarse for an optimiser's small steps. "
            "Load it with dtype=torch.float32, and set bf16=True in the TrainingArguments to compute in half precision."
        )
