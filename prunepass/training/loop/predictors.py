"""Scorers by layer, each with its lens: those in training, and those that a search places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from prunepass.errors import OptionError
from prunepass.plan import PrunePlan
from prunepass.scorers import Scorer, scorer_class
from prunepass.scorers.lens import Lens
from prunepass.scorers.mlp import MlpScorer
from prunepass.training.data.heads import Head
from prunepass.training.loop.config import PruneConfig
from prunepass.training.methods.graphs import TrainingGraphs
from prunepass.training.methods.lenses import fit_lenses

__all__ = ["Predictors", "scorers_by_layer", "stage_parts", "with_weights"]


class Predictors(nn.ModuleDict):
    """A predictor in training for each cut, shared by all plans; empty where the configuration learns none.

    Args:
        cuts: the blocks that they stand before.
        width: of the hidden state.
        config: their own width, and whether each has a lens.
    """

    def __init__(self, cuts: Sequence[int], width: int, config: PruneConfig) -> None:
        super().__init__()
        for cut in cuts if config.learns_predictors else ():
            scorer = MlpScorer(width, config.predictor_width, positions=config.predictor_positions)
            self[str(cut)] = scorer
            if config.restore == "lens":
                scorer.lens = Lens(width, min(config.lens_rank, width))

    def at(self, cut: int) -> MlpScorer:
        """The predictor before block ``cut``."""
        scorer = self[str(cut)]
        assert isinstance(scorer, MlpScorer)
        return scorer

    def of(self, plan: PrunePlan) -> dict[int, MlpScorer] | None:
        """Those of a plan's stages, by stage; None where there are none."""
        return {i: self.at(stage.layer) for i, stage in enumerate(plan.stages)} if self else None

    def load_lenses(self, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over the weights of lenses, by cut."""
        for cut, state in weights.items():
            lens = self.at(cut).lens
            assert lens is not None
            lens.load_state_dict(state)


def scorers_by_layer(
    template: PrunePlan,
    plan: PrunePlan | None,
    graphs: TrainingGraphs,
    head: Head,
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[int, Scorer]:
    """Scorers by layer, with lenses where the template restores by them: those of ``plan``, or fitted to ``batches``.

    Args:
        plan: with trained predictors; None for a scorer that needs no weights.
    """
    if plan is not None:
        has_lens = template.restore == "lens"
        return {stage.layer: _trained(plan, i, graphs.width, has_lens) for i, stage in enumerate(plan.stages)}
    spec, count = template.scorer, len(graphs.blocks)
    made = {
        b: scorer_class(spec.name).load(dict(spec.options), {}, graphs.width, f"of block {b}") for b in range(count)
    }
    if template.restore == "lens":
        watched = graphs.watched(hidden=range(count + 1))
        rank = min(PruneConfig.lens_rank, graphs.width)
        lenses = fit_lenses(watched, watched, head, batches, cuts=range(count), end=count, rank=rank)
        for block, lens in lenses.items():
            made[block].lens = lens
    return made


def _trained(plan: PrunePlan, index: int, width: int, has_lens: bool) -> MlpScorer:
    stage = plan.stages[index]
    if stage.after_attention:
        raise OptionError(f"The predictor {stage.place} cannot be used: search places stages before blocks only.")
    scorer = MlpScorer.load({}, plan.weights_of(index), width, stage.place)
    if has_lens:
        scorer.lens = Lens.load(plan.lens_of(index), width, stage.place)
    return scorer


def with_weights(plan: PrunePlan, scorers: Mapping[int, Scorer]) -> PrunePlan:
    """The plan with a copy of the weights of its stages' scorers and lenses, by stage."""
    weights = {
        f"stages.{i}.{name}": value.detach().to("cpu", copy=True)
        for i, scorer in scorers.items()
        for name, value in scorer.state_dict().items()
    }
    return replace(plan, weights=weights)


def stage_parts(name: str, scorers: Mapping[int, Scorer]) -> dict[str, Any]:
    """What a stage holds, as `BlockCosts.of` takes it, from scorers of one kind."""
    scorer = next(iter(scorers.values()))
    hidden, positions = None, False
    if isinstance(scorer, MlpScorer):
        hidden, positions = scorer.fc1.out_features, scorer.position is not None
    lens = 0 if scorer.lens is None else scorer.lens.rank
    return {"scorer": name, "hidden": hidden, "lens": lens, "positions": positions}
