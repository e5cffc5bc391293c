"""A causal model under a plan: its prompt pruned by the compiler, and what it predicts after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunepass import Protect, PrunePlan, ScorerSpec
from prunepass.cost import FlopCounter
from prunepass.cost.blocks import BlockCosts
from prunepass.dynamo.backend import compilations
from prunepass.graph.capture import capture_module
from prunepass.training.methods.schedules import spread

__all__ = ["PROTECT", "Predictor", "Pruned", "Subject"]

#: of all rows: SDTP's four first tokens and the local tenth of the prompt; the last token predicts the next one
PROTECT = Protect(first=4, last=1, last_share=0.1)  # type: ignore[arg-type]  # taken as a fraction


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
    """

    def __init__(self, model: PreTrainedModel, prompt: int) -> None:
        self.model, self.prompt = model, prompt
        self._captured = capture_module(_Prefill(model), {"input_ids": torch.zeros(2, 32, dtype=torch.int64)})
        self.costs = cache(self._costs)

    @property
    def layers(self) -> range:
        """Where stages stand: before each block but the first."""
        return range(1, self.model.config.num_hidden_layers)

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
