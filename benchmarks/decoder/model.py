"""A causal model under a plan: its prompt pruned by the compiler, what it predicts after it, and more ways to rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunepass import Protect, PrunePlan, ScorerSpec
from prunepass.cost import FlopCounter
from prunepass.cost.blocks import BlockCosts
from prunepass.dynamo.backend import compilations
from prunepass.errors import WeightsError
from prunepass.graph.capture import capture_module
from prunepass.scorers import ScoreInputs, Scorer, register
from prunepass.training.methods.saliency import saliency
from prunepass.training.methods.schedules import spread

#: of all rows: SDTP's four first tokens and the local tenth of the prompt; the last token predicts the next one
PROTECT = Protect(first=4, last=1, last_share=0.1)  # type: ignore[arg-type]  # taken as a fraction

#: kind of saliency that predictors learn and the oracle has
SALIENCY = "norm"


@dataclass(frozen=True)
class Predictor:
    """An MLP scorer's form.

    Attributes:
        width: hidden units.
        positions: whether it looks at places, too.
    """

    width: int = 16
    positions: bool = False


class Subject:
    """A dense model, with what its prompts cost.

    Args:
        model: of transformers, causal, in evaluation mode. Stays as it is.
        prompt: tokens of each prompt.
        layers: blocks before which stages stand, by default each but the first.
    """

    def __init__(self, model: PreTrainedModel, prompt: int, layers: Sequence[int] | None = None) -> None:
        self.model, self.prompt, self._layers = model, prompt, layers
        self._captured = capture_module(_Prefill(model), {"input_ids": torch.zeros(2, 32, dtype=torch.int64)})
        self.costs = cache(self._costs)

    @property
    def layers(self) -> Sequence[int]:
        """Blocks before which stages stand."""
        return self._layers or range(1, self.model.config.num_hidden_layers)

    def dense_flops(self, rows: int) -> int:
        """FLOPs of the unpruned prefill of so many prompts."""
        return FlopCounter(self._captured.graph_module).total(rows, self.prompt)

    def plan(self, scorer: ScorerSpec, budget: float, predictor: Predictor | None = None, **options: Any) -> PrunePlan:
        """The geometric schedule whose prefill, scoring included, takes ``budget`` of the dense FLOPs.

        Args:
            predictor: for scorer "mlp".
            options: of the plan, such as its weights.
        """
        stages = spread(
            budget, self.costs(scorer, predictor), lengths=[self.prompt], layers=self.layers, protect=PROTECT
        )
        return PrunePlan(stages, scorer, PROTECT, **options)

    def _costs(self, scorer: ScorerSpec, predictor: Predictor | None) -> BlockCosts:
        if scorer.name == "given":  # what is known beforehand costs nothing
            return BlockCosts.of(self._captured, scorer="norm")
        if predictor is None:
            return BlockCosts.of(self._captured, scorer=scorer)
        costs = BlockCosts.of(self._captured, scorer="norm")
        return costs.with_predictor(self.model.config.hidden_size, predictor.width, positions=predictor.positions)


class Pruned:
    """The model compiled with a plan; without one, the dense model.

    Args:
        prepare: called with the ids [R, P + C] before each prompt of theirs runs.
    """

    def __init__(
        self, subject: Subject, plan: PrunePlan | None = None, prepare: Callable[[Tensor], None] | None = None
    ) -> None:
        self._subject, self._plan, self._prepare = subject, plan, prepare
        self._model: Any = copy.deepcopy(subject.model)
        if plan is not None:
            torch._dynamo.reset()
            self._model.compile(backend="tokprune", options={"plan": plan, "target": "eager"})

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[R, C, V], what the model predicts of each of the last C tokens of ``ids`` [R, P + C]: the P before them are
        the prompt, which is pruned; the others are given one by one, and see what its caches hold."""
        if self._prepare is not None:
            self._prepare(ids)
        prompt, rest = ids[:, : self._subject.prompt], ids[:, self._subject.prompt : -1]
        first = self._model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        if not rest.shape[1]:
            last: Tensor = first.logits
            return last
        # calls that go on from a cache are never pruned, so they need no compiling
        cache = self.after_prompt(first.past_key_values, prompt)
        later = self._model.forward(input_ids=rest, past_key_values=cache, use_cache=True)
        return torch.cat([first.logits, later.logits], dim=1)

    def after_prompt(self, cache: Any, prompt: Tensor) -> Any:
        """The cache that the rest of the text sees, [R, P] ids ``prompt`` having run; here the one that they left."""
        return cache

    def flops(self, rows: int) -> float:
        """FLOPs of the prefill that was compiled last, as a share of the dense one's: counted on the graph that ran."""
        result = compilations()[0].result
        assert result is not None
        size = (rows, self._subject.prompt)
        return FlopCounter(result.graph_module, batch=size[0], length=size[1]).total(*size) / self._dense(rows)

    def _dense(self, rows: int) -> int:
        return self._subject.dense_flops(rows)


class _Prefill(nn.Module):
    """The call that a prompt makes, without its cache, which costs nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        outputs: Mapping[str, Tensor] = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return outputs["logits"]


# -- ways to rank the tokens of a prompt that prunepass itself does not have -----------------------------------------


@register
class RecencyScorer(Scorer):
    """The later, the better. With the first tokens protected this is sink + recent (StreamingLLM, arXiv:2309.17453),
    on the hidden states."""

    name: ClassVar[str] = "recency"

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] places in the row, float32."""
        return inputs.rank.to(torch.float32)


@register
class LastRowScorer(Scorer):
    """Attention of the row's last token, mean over the heads of the block before: LazyLLM (arXiv:2407.14057, eq. 1) and
    FastV (arXiv:2403.06764) rank so. It costs one query's row of the product with the keys."""

    name: ClassVar[str] = "last-row"
    needs_attention = True

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] shares of attention, float32. Takes rows that end in their last token (no padding on the right)."""
        attention = inputs.attention
        assert attention is not None
        assert attention.query is not None
        assert attention.key is not None
        query, key = attention.query[:, :, -1:], attention.key
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
        scores = torch.matmul(query * scale, key.transpose(-1, -2)).float()
        if inputs.alive is not None:
            scores = scores.masked_fill(~inputs.alive[:, None, None, :], torch.finfo(torch.float32).min)
        return torch.softmax(scores, dim=-1).mean(dim=(1, 2))


@register
class GivenScorer(Scorer):
    """Scores known from elsewhere, by place in the row: for an oracle, which has seen how the row goes on.

    The plan carries them as ``stages.<i>.scores`` [B, S], and what is compiled reads that very tensor: write the next
    batch's scores into it.
    """

    name: ClassVar[str] = "given"
    needs_weights: ClassVar[bool] = True

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(scores, requires_grad=False)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] float32."""
        rows = torch.arange(inputs.rank.shape[0], device=inputs.rank.device)[:, None]
        return self.scores[rows, inputs.rank]

    @classmethod
    def load(cls, options: Mapping[str, Any], weights: Mapping[str, Tensor], width: int, where: str) -> GivenScorer:
        """Over the plan's own tensor; see `Scorer.load` for the errors."""
        if options or set(weights) != {"scores"}:
            raise WeightsError(f"The scorer 'given' {where} takes the weight 'scores' alone.")
        return cls(weights["scores"])


def future_saliency(model: Any, ids: Tensor, prompt: int, cuts: Sequence[int], kind: str = SALIENCY) -> list[Tensor]:
    """[R, P] for each cut: how much each token of the prompt matters to the largest logits after it.

    Args:
        ids: [R, P + C]; the first P are the prompt.
        cuts: blocks before which the hidden state is looked at.
        kind: a key of `prunepass.training.methods.saliency.SALIENCIES`.
    """
    hidden: dict[int, Tensor] = {}
    handles = [
        model.model.layers[cut].register_forward_pre_hook(
            lambda _, args, cut=cut: hidden.update({cut: args[0]})  # transformers gives the state by position
        )
        for cut in cuts
    ]
    try:
        with torch.enable_grad():
            later = ids.shape[1] - prompt + 1  # logits of a large vocabulary are what this costs in memory
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=later).logits[:, :-1]
            target = logits.amax(-1).mean(1).sum()
    finally:
        for handle in handles:
            handle.remove()
    return [found[:, :prompt] for found in saliency(target, [hidden[cut] for cut in cuts], kind)]


class Oracle:
    """A plan whose scores are the true saliency; `prepare` writes those of the next rows.

    Args:
        rows: how many prompts run at a time.
    """

    def __init__(self, subject: Subject, budget: float, rows: int) -> None:
        self._subject = subject
        bare = subject.plan(ScorerSpec("given"), budget)
        self._cuts = [stage.layer for stage in bare.stages]
        self._scores = [torch.zeros(rows, subject.prompt) for _ in self._cuts]
        weights = {f"stages.{i}.scores": scores for i, scores in enumerate(self._scores)}
        self.plan = PrunePlan(bare.stages, bare.scorer, bare.protect, weights=weights)

    def prepare(self, ids: Tensor) -> None:
        """For rows [R, P + C]."""
        found = future_saliency(self._subject.model, ids, self._subject.prompt, self._cuts)
        for scores, true in zip(self._scores, found, strict=True):
            scores.copy_(true)
