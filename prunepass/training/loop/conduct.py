"""Which phase a step belongs to, and what happens between phases: plans are searched for, spread, or read off gates."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from prunepass.cost.model import CostModel
from prunepass.cost.plans import PlanCosts
from prunepass.errors import OptionError, PlanError
from prunepass.plan import PrunePlan, Stage
from prunepass.training.loop.checkpoint import keep_plans
from prunepass.training.loop.processes import from_main, is_main
from prunepass.training.loop.progress import Progress, Silent, Stop
from prunepass.training.loop.student import Phase, Student
from prunepass.training.methods.calibrate import Calibration
from prunepass.training.methods.schedules import fit, spread
from prunepass.training.methods.search import SearchResult, search

__all__ = ["Conductor"]

logger = logging.getLogger(__name__)

_RANK_EVERY = 4  # saliency takes a backward pass through the dense model, which would double the cost of a step
_LOWEST = 1e-3  # keeps are held to thousandths


class Conducted(Protocol):
    """What a `Conductor` needs of the Trainer."""

    student: Student
    costs: CostModel
    order: torch.Generator
    order_seed: int

    def calibration_batches(self) -> list[dict[str, Any]]:
        """Batches of rows that plans are compared on."""

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """The precision of training."""


class Conductor(TrainerCallback):
    """Sets the student's phase, progress and plan before each step.

    Args:
        trainer: whose student it conducts.
        budgets: cost shares to find plans for, the goal's first.
        lengths: live tokens of rows like those to come.

    Attributes:
        progress: told of searches.
        stop: whether training is asked to stop.
    """

    def __init__(self, trainer: Conducted, budgets: Sequence[float], lengths: Sequence[int]) -> None:
        self._trainer = trainer
        self._student: Student = trainer.student
        self._budgets, self._lengths = tuple(budgets), tuple(lengths)
        self.progress: Progress = Silent()
        self.stop = Stop()
        self._unsaved = False  # whether plans were searched for since the last checkpoint

    # -- steps ---------------------------------------------------------------------------------------------------

    def borders(self, steps: int) -> tuple[int, int]:
        """The steps at which selecting and adapting begin."""
        _, select, adapt = self._student.settings.phases
        return round(select * steps), round(adapt * steps)

    def model_begins(self, steps: int) -> int:
        """The step from which the model's own weights learn."""
        return self.borders(steps)[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins with the ranking, or where a checkpoint left off."""
        _find_best(args, state)
        _ = self._student.forms.graphs  # makes the teacher, before the model changes
        if state.global_step == 0 and self._student.settings.learns_lenses:
            self._student.predictors.load_lenses(from_main(self._lenses))
        self._enter(self._phase_of(state.global_step, state.max_steps))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order of rows hangs on the epoch alone, so that it is the same after resuming."""
        self._trainer.order.manual_seed(self._trainer.order_seed + int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets what the step is to do."""
        student, step = self._student, self._student.step
        phase = self._phase_of(state.global_step, state.max_steps)
        if phase is not student.phase:
            self._enter(phase)
        select, adapt = self.borders(state.max_steps)
        through = (state.global_step - select) / max(1, adapt - select)
        step.progress = min(1.0, max(0.0, through))
        # draws are the same in all processes, and after resuming
        seed = args.seed * 1_000_003 + state.global_step
        step.draws = torch.Generator().manual_seed(seed)
        student.chosen = self._drawn(random.Random(seed))
        logs_every = (
            args.logging_steps if args.logging_steps >= 1 else max(1, round(args.logging_steps * state.max_steps))
        )
        step.watches = (state.global_step + 1) % int(logs_every) == 0
        step.ranks = step.watches or self._ranks_each_step(phase) or state.global_step % _RANK_EVERY == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Holds gates in their range, and notes the stages they stand for when they come below a budget."""
        self._student.chosen = 0  # evaluation looks at the goal's plan
        self._only_pruned(control)
        self._save_around_search(args, state, control)
        self._look_first(args, state, control)
        gates = self._student.gates
        if gates is None or self._student.phase is not Phase.SELECT:
            return
        gates.clamp_()
        stages = self._stages_of_gates()
        share = self._costs.share(stages) if stages else 1.0
        for budget in self._budgets:
            if share <= budget > min(self._budgets):  # the tightest takes the gates as they end
                self._student.read_off.setdefault(f"{budget:g}", stages)

    def _save_around_search(self, args: Any, state: Any, control: Any) -> None:
        """A search takes long: a run that is stopped in it, or later, goes on from where it began, or ended."""
        if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
            return
        ahead = self._phase_of(state.global_step, state.max_steps) is not self._student.phase
        if self._unsaved or (ahead and self._will_search and state.global_step < state.max_steps):
            control.should_save = True
        self._unsaved = False

    def _look_first(self, args: Any, state: Any, control: Any) -> None:
        """The best is chosen among states from the first plan on: adapting may make a model worse from its first step.

        With a warmup the rate of that step is 0, so that the model's own weights are as they were before it. A delay
        that is asked for holds here, too.
        """
        if args.eval_delay or not args.load_best_model_at_end:
            return
        if state.best_metric is None and self._student.plans:
            control.should_evaluate = control.should_save = True

    @property
    def _will_search(self) -> bool:
        settings = self._student.settings
        return not self._student.plans and settings.plan is None and settings.searches_by == "measure"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `on_step_end`."""
        self._only_pruned(control)

    def _only_pruned(self, control: Any) -> None:
        """Figures of the dense model would pass for the best of the pruned one."""
        if not self._student.plans:
            control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """There is a plan in the end, however few the steps were; a checkpoint of the last step learns of it."""
        self._student.chosen = 0
        if self.stop.asked:
            return  # what is missing is decided when training goes on
        self._decide()
        last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._unsaved and is_main() and last.is_dir():
            keep_plans(self._student, last)
        self._unsaved = False

    def settle(self) -> None:
        """There is a plan, after a checkpoint of the last step was taken up."""
        self._decide()

    def _drawn(self, chance: random.Random) -> int:
        """The goal's plan at half of the steps, else one of the others."""
        others = len(self._student.plans) - 1
        return chance.randint(1, others) if others > 0 and chance.random() < 0.5 else 0

    def _ranks_each_step(self, phase: Phase) -> bool:
        """SDTP selects under its ranking loss; else what is ranked by is looked at now and then where it is dear."""
        settings = self._student.settings
        return settings.ranks_by == "attention" or (settings.method == "sdtp" and phase is Phase.SELECT)

    def _phase_of(self, step: int, steps: int) -> Phase:
        select, adapt = self.borders(steps)
        return Phase.RANK if step < select else Phase.SELECT if step < adapt else Phase.ADAPT

    def _enter(self, phase: Phase) -> None:
        student = self._student
        logger.info("phase: %s", phase.value)
        student.phase = phase
        if phase is Phase.ADAPT or (phase is Phase.SELECT and student.gates is None):
            self._decide()

    def _lenses(self) -> Any:
        """Fitted to the dense model, on the rows that a search looks at."""
        batches = self._trainer.calibration_batches()
        with self._trainer.compute_loss_context_manager():
            return self._student.fit_lenses(batches)

    # -- plans ---------------------------------------------------------------------------------------------------

    @property
    def _costs(self) -> PlanCosts:
        settings = self._student.settings
        return PlanCosts.over(self._trainer.costs, self._lengths, settings.protect, settings.leave)

    def _decide(self) -> None:
        """Plans for all budgets, unless there are some."""
        student = self._student
        if student.plans:
            return
        settings = student.settings
        if settings.plan is not None:
            self._check_fixed(settings.plan)
            student.plans = [student.fixed_plan()]
            return
        ways = {"measure": self._searched, "gates": self._gated, "spread": self._spread}
        student.plans = ways[settings.searches_by]()
        for budget, plan in zip(self._budgets, student.plans, strict=True):
            logger.info("budget %.3f: %s", budget, ", ".join(f"{s.place} {s.keep}" for s in plan.stages))

    def _searched(self) -> list[PrunePlan]:
        """By measuring on calibration rows in the main process; the others take over what it found."""
        if self.stop.asked:
            raise KeyboardInterrupt
        with self.stop.waiting(False):  # it leaves nothing before its end, and a checkpoint lies before it
            return self._searched_in_main()

    def _searched_in_main(self) -> list[PrunePlan]:
        found = from_main(self._search)
        self._unsaved = True
        return found

    def _search(self) -> list[PrunePlan]:
        student, settings = self._student, self._student.settings
        student.eval()
        results: list[SearchResult] = []
        batches = self._trainer.calibration_batches()
        with self._trainer.compute_loss_context_manager():  # both in one precision
            teacher = student.forms.teacher().module
            calibration = Calibration(student.head, batches, teacher, pairs=settings.pairs)

        known: dict[Any, float] = {}  # budgets have their single cuts in common

        def evaluate(plan: PrunePlan) -> float:
            if not plan.stages:
                return 0.0  # the dense model, compared with itself
            key = (plan.stages, plan.protect)
            if key not in known:
                with self._trainer.compute_loss_context_manager():
                    known[key] = calibration.loss(student.forms.graphs.pruned(plan, student.scorers(plan)))
            return known[key]

        self.progress.begin("searching", settings.max_evaluations * len(self._budgets))
        for budget in self._budgets:
            result = search(
                evaluate,
                self._trainer.costs,
                budget,
                lengths=self._lengths,
                template=student.plan_of(()),
                layers=student.cuts,
                max_evaluations=settings.max_evaluations,
                beginnings=settings.beginnings,
                on_step=lambda what: self.progress.step(f"searching: {what}"),
                leave=settings.leave,
                from_embeddings=calibration.from_embeddings,
            )
            results.append(result)
        self.progress.end()
        student.train()
        student.searches = [r.to_dict() for r in results]
        return [r.plan for r in results]

    def _spread(self) -> list[PrunePlan]:
        return [self._student.plan_of(self._geometric(budget)) for budget in self._budgets]

    def _geometric(self, budget: float) -> list[Stage]:
        """From block 1 on, or from the embeddings on where the budget cannot be met otherwise."""
        cuts, protect = self._student.cuts, self._student.settings.protect
        later = [cut for cut in cuts if cut > 0]
        try:
            return list(spread(budget, self._trainer.costs, lengths=self._lengths, layers=later, protect=protect))
        except OptionError:
            if later == list(cuts):
                raise
        return list(spread(budget, self._trainer.costs, lengths=self._lengths, layers=cuts, protect=protect))

    def _gated(self) -> list[PrunePlan]:
        """What the gates stood for when their cost came below each budget, brought right up to it."""
        last = self._stages_of_gates()
        read_off = self._student.read_off
        found = (self._fitted(read_off.get(f"{b:g}", last), b) for b in self._budgets)
        return [self._student.plan_of(stages) for stages in found]

    def _fitted(self, stages: list[Stage], budget: float) -> list[Stage]:
        fitted = fit(self._costs, stages, budget, lowest=_LOWEST) if stages else None
        if fitted is None:  # the training was too short for the gates to open, or they open too late in the model
            logger.warning("the gates chose no stages that meet %g; taking a geometric schedule", budget)
            return self._geometric(budget)
        return list(fitted)

    def _stages_of_gates(self) -> list[Stage]:
        gates = self._student.gates
        assert gates is not None
        with torch.no_grad():
            keeps = gates.keeps()
        return [Stage(c, k) for c, k in zip(self._student.cuts, keeps, strict=True) if k is not None and k < 1]

    def _check_fixed(self, plan: PrunePlan) -> None:
        if self._student.settings.freeze_model and all(stage.keep == 1 for stage in plan.stages):
            raise PlanError("The plan keeps every token, so with a frozen model there is nothing to learn.")
        if not self._student.predictors:
            return  # whatever the scorer can do, and `prune_graph` says what it cannot
        wrong = [s.place for s in plan.stages if s.layer not in self._student.cuts or s.after_attention]
        if wrong:
            raise PlanError(
                f"Predictors are trained before blocks {self._student.cuts[0]} to {self._student.cuts[-1]}; the plan "
                f"has a stage {wrong[0]}."
            )


def _find_best(args: Any, state: Any) -> None:
    """The Trainer forgets the best checkpoint of a run whose folder was moved: it lies where this run writes."""
    if args.load_best_model_at_end and state.best_model_checkpoint is None and state.best_global_step:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
