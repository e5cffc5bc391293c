"""What the dense model says of a batch: which tokens matter, hidden states, and the outputs to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunepass.passes.live import LiveTokens, live_tokens
from prunepass.passes.segments import TYPES_NAME
from prunepass.plan import Protect
from prunepass.training.data.heads import Head
from prunepass.training.loop.config import PruneConfig
from prunepass.training.methods.forms import Forms
from prunepass.training.methods.saliency import confidence, saliency

__all__ = ["Taught", "competing", "live_of", "own_hidden", "teach"]


@dataclass(frozen=True)
class Taught:
    """Without gradients.

    Attributes:
        importance: of each token by cut, [B, S]; empty unless asked for.
        hidden: by block, the residual stream before it, [B, S, D]; empty unless asked for.
        answers: the dense model's outputs.
    """

    importance: dict[int, Tensor]
    hidden: dict[int, Tensor]
    answers: Any


def teach(
    forms: Forms,
    head: Head,
    settings: PruneConfig,
    batch: Mapping[str, Tensor],
    *,
    ranks: bool = True,
    needs_hidden: bool = False,
) -> Taught:
    """Run the teacher.

    Args:
        settings: say by what tokens are ranked. Saliency takes a backward pass from the first cut on.
        ranks: whether importance is asked for.
        needs_hidden: whether hidden states are.
    """
    watched = forms.teacher()
    by_gradient = ranks and settings.ranks_by == "saliency"
    for cut, tap in watched.hidden.items():
        tap.leaf = by_gradient and cut == forms.cuts[0]
    with torch.set_grad_enabled(by_gradient):
        answers = watched.module(**head.model_inputs(batch))
    hidden = {cut: tap.take() for cut, tap in watched.hidden.items()}
    attention = watched.attention[forms.num_blocks - 1].take()
    importance: dict[int, Tensor] = {}
    if by_gradient:
        target = confidence(answers, batch, head.salient(batch))
        labels = saliency(target, [hidden[cut] for cut in forms.cuts], settings.saliency)
        importance = dict(zip(forms.cuts, labels, strict=True))
    elif ranks:
        importance = dict.fromkeys(range(forms.num_blocks), attention)  # a fixed plan may stand above the cuts
    states = {cut: state.detach() for cut, state in hidden.items()} if needs_hidden else {}
    return Taught(importance, states, _detached(answers))


@torch.no_grad()
def own_hidden(forms: Forms, head: Head, batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """By cut, the residual stream of the student itself, unpruned, [B, S, D]."""
    watched = forms.dense()
    watched.module(**head.model_inputs(batch))
    return {cut: tap.take() for cut, tap in watched.hidden.items()}


def competing(batch: Mapping[str, Tensor], protect: Protect) -> Tensor:
    """[B, S] bool: the tokens that compete, live and not protected."""
    found = live_of(batch, protect)
    free = found.protected == 0
    return free if found.alive is None else free & found.alive


def live_of(batch: Mapping[str, Tensor], protect: Protect) -> LiveTokens:
    """`live_tokens` of a batch."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    tokens = mask if ids is None else ids  # of images and sound there are no ids
    assert tokens is not None
    return live_tokens(tokens, mask, ids, protect, batch.get(TYPES_NAME))


def _detached(outputs: Any) -> Any:
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            outputs[name] = value.detach()
    return outputs
