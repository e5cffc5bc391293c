"""What `PruneTrainer` is told beside transformers' own `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunepass.errors import OptionError
from prunepass.plan import Protect, PrunePlan, ScorerSpec
from prunepass.plan.annotations import Leave, Restore
from prunepass.training.data.declare import check
from prunepass.training.data.options import Goal, TrainOptions, refuse_frozen_attention
from prunepass.training.methods.saliency import SALIENCIES
from prunepass.training.methods.search import BEGINNINGS

__all__ = ["PruneConfig"]

SEARCHES = ("measure", "gates", "spread")


@dataclass(frozen=True)
class PruneConfig:
    """How a model learns to be pruned.

    Training runs through up to three phases, each a share of the steps. *Rank*: predictors learn from the dense model
    which tokens matter. *Select*: through soft choices, layers and shares are found, or predictors learn which choice
    gives the dense model's answer. *Adapt*: the model, pruned as it will be deployed, learns to answer like the dense
    one.

    Args:
        goal: what the pruned model may cost.
        method: ``"both"`` (default), ``"top"`` or ``"sdtp"``; see `prunepass.training.data.options.METHODS`.
        search: how layers and shares are found. ``"measure"``: post-training search on calibration rows between two
            phases (`training.search`). ``"gates"``: ToP's hard-concrete gates under a Lagrangian constraint, during a
            phase of their own. ``"spread"``: a fixed geometric schedule. None takes what belongs to the method:
            measure, gates, spread.
        plan: fixed stages, in place of a search; they bring their own ways of leaving, protected tokens and restoring.
            With predictors (any method but ``"top"``) they stand before blocks; else wherever ``scorer`` can rank.
        extra_budgets: cost shares that the model learns beside the goal's, so that one set of weights serves several
            budgets, as in the Length-Adaptive Transformer (arXiv:2010.07003). Half of the steps train the goal's plan,
            the others one of the rest, drawn at random.
        protect: of the plans, see `PrunePlan`.
        restore: of the plans, see `PrunePlan`. With ``"lens"`` a lens is learned beside each predictor: fitted in
            closed form to the dense model, then trained on as predictors are.
        scorer: for ``method="top"``: what ranks tokens; a name, or a mapping with options as in a plan. None takes the
            scorer of ``plan``, and attention where there is no plan.
        predictor_width: hidden units of an MLP predictor. SDTP takes the model's width; a tenth of it ranks as well.
        predictor_positions: let predictors look at a token's place in its row, too (`scorers.mlp.MlpScorer`), which the
            hidden states of models with rotary positions do not hold.
        leave: how tokens leave, see `Stage`: "drop" or "merge". Soft choices are learned as if tokens were dropped.
        lens_rank: of the lenses; at most the model's width.
        freeze_model: leave the model's own weights alone; predictors rank, then select.
        rank_steps: share of the steps for ranking; with a frozen model, all that ``gate_steps`` leave.
        gate_steps: share of the steps for selecting.
        predictor_learning_rate: of the predictors; ``TrainingArguments.learning_rate`` is the model's.
        gate_learning_rate: of the gates.
        temperature: of logit distillation.
        rank_weight: of the ranking loss beside the distillation loss. While the model adapts to a ranking by saliency,
            this loss is taken at one step in four, as it costs a backward pass through the dense model.
        hidden_weight: while the model adapts, of the cosine distance of its kept tokens' states from the dense model's,
            mean over the blocks below the first stage. Says far more of each text than its answer does. None takes 3
            for ``"both"`` and 0 for the others, whose papers have no such loss. Left out where another model teaches.
        task_weight: of the loss on labels, where the data have them (ToP: 0).
        ranking_loss: ``"logistic"`` (SDTP), ``"arp2"`` or ``"ndcg2"`` (ToP); None takes the method's own.
        ranking_top: how many of the teacher's best tokens the Lambda losses look at.
        signal: what a predictor learns to rank by: ``"attention"`` received in the dense model's last block (ToP), or
            ``"saliency"`` at the predictor's own place (SDTP). None takes attention for ``"top"`` and saliency for the
            others: predictors that learned saliency lost less on each task that both were tried on.
        saliency: kind of SDTP's labels, a key of `training.saliency.SALIENCIES`.
        noise: logistic noise on the scores while SDTP selects (its Gumbel-softmax); 0 for straight-through alone.
        gate_init: log alpha of the coarse gates at the start. ToP's -10 means off with probability 0.95 and wants a
            thousand steps and more; from 0 some hundred will do.
        bins: percentiles of the ranking that a fine gate tells apart.
        warmup: share of the gate phase over which the cost share falls to the budget.
        calibration_rows: rows that a measured search looks at, at most. A search among some dozens of plans finds those
            that suit few rows by chance: MiniLM on STS-B at half of the FLOPs, model frozen, has a Spearman correlation
            of .687 with the plan found on 128 rows and of .747 with that found on 768.
        calibration_tokens: and so many tokens at most, as long texts tell more each.
        max_evaluations: plans that a measured search tries.
        beginnings: numbers of tokens at the start of each row that a measured search tries as protected, beside those
            of ``protect``: titles and questions stand there.
        pairs: whether rows are pairs of texts. A measured search for a model with one answer a pair keeps off the first
            block then, before which the texts have not met. None: told by ``token_type_ids``, which not all models
            read.
    """

    goal: Goal
    method: str = TrainOptions.method
    search: str | None = None
    plan: PrunePlan | None = None
    extra_budgets: tuple[float, ...] = ()
    protect: Protect = field(default_factory=Protect)
    restore: Restore = "last"
    scorer: str | Mapping[str, Any] | None = None
    predictor_width: int = 32
    predictor_positions: bool = TrainOptions.predictor_positions
    leave: Leave = "drop"
    lens_rank: int = 128
    freeze_model: bool = TrainOptions.freeze_model
    rank_steps: float = 0.15
    gate_steps: float = 0.35
    predictor_learning_rate: float = TrainOptions.predictor_learning_rate
    gate_learning_rate: float = 1e-1
    temperature: float = 2.0
    rank_weight: float = 0.1
    hidden_weight: float | None = None
    task_weight: float = 0.0
    ranking_loss: str | None = None
    ranking_top: int = 64
    signal: str | None = None
    saliency: str = "absolute"
    noise: float = 0.0
    gate_init: float = 0.0
    bins: int = 50
    warmup: float = 0.6
    calibration_rows: int = TrainOptions.calibration_rows
    calibration_tokens: int = 48_000
    max_evaluations: int = 60
    beginnings: tuple[int, ...] = BEGINNINGS
    pairs: bool | None = None

    def __post_init__(self) -> None:
        check(self, like=TrainOptions)
        for name, value, known in (
            ("search", self.searches_by, SEARCHES),
            ("ranking_loss", self.ranks_with, ("logistic", "arp2", "ndcg2")),
            ("signal", self.ranks_by, ("attention", "saliency")),
        ):
            if value not in known:
                raise OptionError(f"There is no {name} {value!r}; choose one of {', '.join(known)}.")
        if self.plan is not None and not isinstance(self.plan, PrunePlan):
            raise OptionError(
                "The plan must be a PrunePlan. Read that of a folder by PrunePlan.from_pretrained(folder)."
            )
        if self.method == "top" and self.signal == "saliency":
            raise OptionError('ToP distils attention into attention; for saliency take the method "both" or "sdtp".')
        if self.saliency not in SALIENCIES:
            raise OptionError(f"There is no saliency {self.saliency!r}; choose one of {', '.join(SALIENCIES)}.")
        if self.searches_by == "measure" and self.max_evaluations < 12:
            raise OptionError(f"A search tries 12 plans at least; max_evaluations is {self.max_evaluations}.")
        for name in ("rank_steps", "gate_steps", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if any(not isinstance(first, int) or first < 0 for first in self.beginnings):
            raise OptionError(f"beginnings are whole numbers of tokens, not {self.beginnings}.")
        for share in self.extra_budgets:
            Goal(share=share)
        if self.restore == "none":
            raise OptionError(
                'restore="none" leaves outputs shorter than the labels and the states of the teacher. Train with '
                'another one, and give the plan restore="none" afterwards.'
            )
        if self.learns_lenses and not self.learns_predictors:
            raise OptionError('ToP has no predictors to learn lenses beside: restore "last" or "zeros".')
        if self.predictor_positions and not self.learns_predictors:
            raise OptionError("ToP has no predictors that could look at places: leave predictor_positions out.")
        if self.learns_lenses and self.leave == "merge":
            raise OptionError('Merged tokens have the states of their hosts: with leave="merge" restore "last".')
        if self.lens_rank < 1:
            raise OptionError(f"lens_rank must be at least 1, not {self.lens_rank}.")
        refuse_frozen_attention(self.method, self.freeze_model)
        if self.extra_budgets and (self.plan is not None or self.goal.share is None):
            raise OptionError("extra_budgets go with a goal that is a share, and with plans that are searched for.")

    @property
    def ranker(self) -> ScorerSpec:
        """`scorer`, read, or what stands for it."""
        if self.scorer is not None:
            return ScorerSpec.of(self.scorer)
        return ScorerSpec("attention") if self.plan is None else self.plan.scorer

    @property
    def searches_by(self) -> str:
        """`search`, or the method's own."""
        return self.search or {"both": "measure", "top": "gates", "sdtp": "spread"}[self.method]

    @property
    def ranks_with(self) -> str:
        """`ranking_loss`, or the method's own."""
        return self.ranking_loss or ("arp2" if self.method == "top" else "logistic")

    @property
    def ranks_by(self) -> str:
        """`signal`, or the method's own."""
        return self.signal or ("attention" if self.method == "top" else "saliency")

    @property
    def likens_by(self) -> float:
        """`hidden_weight`, or the method's own."""
        if self.hidden_weight is None:
            return 3.0 if self.method == "both" else 0.0
        return self.hidden_weight

    @property
    def learns_predictors(self) -> bool:
        """Whether MLP predictors are trained (else a scorer without weights ranks)."""
        return self.method != "top"

    @property
    def learns_lenses(self) -> bool:
        """Whether lenses are trained beside the predictors."""
        return self.restore == "lens"

    @property
    def has_gate_phase(self) -> bool:
        """Whether a model that adapts is first trained through soft choices: ToP's gates, or SDTP's selection.

        Tried for ``"both"``, too, on STS-B at 1/2 of the FLOPs (development set, one seed): 4.4 points were lost after
        719 steps with soft choices, and 3.1 after 360 without; on the test set 4.6 and 3.3, after 719 steps both.
        """
        return (self.plan is None and self.searches_by == "gates") or self.method == "sdtp"

    @property
    def phases(self) -> tuple[float, float, float]:
        """Shares of the steps at which the phases begin: rank, select, adapt."""
        if self.freeze_model:  # nothing is left to adapt
            return 0.0, 1.0 - self.gate_steps, 1.0
        select = self.rank_steps if self.learns_predictors else 0.0
        adapt = select + (self.gate_steps if self.has_gate_phase else 0.0)
        return 0.0, select, min(adapt, 1.0)
