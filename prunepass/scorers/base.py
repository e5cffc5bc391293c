"""What a scorer is: a small module that gives every token one importance number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunepass.errors import PlanError, WeightsError
from prunepass.scorers.lens import Lens

__all__ = ["Attention", "Hosts", "ScoreInputs", "Scorer"]


@dataclass(frozen=True)
class Attention:
    """The attention of the block before a cut, as a scorer sees it.

    Either ``probabilities`` is given (the model computes them itself), or ``query``, ``key`` and what fused attention
    does with them.

    Attributes:
        query, key: [B, H, T, d]; key may have fewer heads (grouped queries).
        mask: broadcastable to [B, H, T, T]; bool (True attends) or added to the scores; None for none.
        is_causal: whether later keys are hidden.
        scale: factor of the scores; None for 1 / sqrt(d).
        probabilities: [B, H, T, T], rows sum to 1.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer may look at, for the T slots that reach a stage.

    Attributes:
        hidden: [B, T, D], the residual stream at the cut.
        alive: [B, T] bool, False at padding and at surplus slots; None where every slot is alive.
        rank: [B, T] int64, the token's place among the row's original live tokens, from 0.
        token_ids: [B, T] int64, where the model takes ids.
        attention: of the block before, for scorers that ask for it.
        end: [B, 1] int64, how many live tokens come before those that the plan protects at the row's end; always given
            in a graph.
        protected: [B, T] int64, zero at tokens that may leave; None where the plan does not say which may
            (`Protect.only_ids`).
        tokens: T, where the model fixes it (images of one size): a scorer may compute sizes from it. None where T is
            open, of which no size may be computed but T itself.
    """

    hidden: Tensor
    alive: Tensor | None
    rank: Tensor
    token_ids: Tensor | None = None
    attention: Attention | None = None
    end: Tensor | None = None
    protected: Tensor | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Hosts:
    """How a stage that merges finds the kept token that another one is averaged into.

    Attributes:
        vectors: [B, T, W] floating; the nearest is that of the greatest cosine. None for the hidden states.
        levels: [B, T] int64; a host is of a higher level than the token, and any one where that has the row's highest.
            None where all tokens may meet.
    """

    vectors: Tensor | None = None
    levels: Tensor | None = None


class Scorer(nn.Module):
    """Base of all scorers. A new one sets ``name`` and overrides `score`; the rest of the pass is not its business.

    A score is any finite number, larger for tokens that should stay; only the order within a row counts. It must not
    depend on dead slots, or padding would change results. Scores of dead slots are ignored.

    ``options`` of a plan (``{"name": "random", "seed": 7}``) reach the constructor as keyword arguments; trained
    weights go through `load`.

    Attributes:
        lens: what estimates the last hidden state of tokens that leave here, in a plan that restores by "lens".
    """

    name: ClassVar[str] = ""
    #: whether `score` reads ``inputs.attention``; an option may decide it, see `reads_attention`
    needs_attention: bool = False
    #: whether the scorer cannot work without trained weights
    needs_weights: ClassVar[bool] = False
    #: whether levels of `hosts` leave each leaving token a host wherever a token that is not protected stays
    has_hosts_for_all: ClassVar[bool] = False
    lens: Lens | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("lens", None)

    def score(self, inputs: ScoreInputs) -> Tensor:
        """[B, T] floating scores for the slots of ``inputs``; plain torch, traceable, no data-dependent shapes."""
        raise NotImplementedError

    def hosts(self, inputs: ScoreInputs) -> Hosts:
        """How a stage with ``leave="merge"`` finds hosts: by the states of all tokens, unless overridden."""
        return Hosts()

    @classmethod
    def reads_attention(cls, options: Mapping[str, Any]) -> bool:
        """``needs_attention`` of a scorer with these options of a plan."""
        return cls.needs_attention

    def forward(self, inputs: ScoreInputs) -> Tensor:
        """`score`, so that a scorer is a module like any other."""
        return self.score(inputs)

    @classmethod
    def load(cls, options: Mapping[str, Any], weights: Mapping[str, Tensor], width: int, where: str) -> Scorer:
        """Build a scorer for hidden states of ``width`` from a plan's options and weights.

        Raises:
            PlanError: an option that it does not take.
            WeightsError: weights that are missing, left over, or of another width.
        """
        try:
            scorer = cls(**options)
        except TypeError as e:
            raise PlanError(f"The scorer {cls.name!r} {where} cannot take the options {dict(options)}: {e}.") from None
        cls.check_weights(weights, where)
        return scorer

    @classmethod
    def check_weights(cls, weights: Mapping[str, Tensor], where: str) -> None:
        """Raise `WeightsError` where ``weights`` are not those of one such scorer, whatever the width of its model.

        Here any are: a scorer that takes weights overrides `load`, and should override this one.
        """
        if weights:
            raise WeightsError(
                f"The plan carries weights for the stage {where}, but its scorer {cls.name!r} takes none. "
                "Was the plan made for another scorer?"
            )


def as_scores(values: Tensor) -> Tensor:
    """Scores in at least float32: half precision has too few different numbers to rank hundreds of tokens."""
    return values if values.dtype == torch.float64 else values.float()
