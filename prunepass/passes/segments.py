"""Which tokens a plan protects by what they are: by their id, or by the segment of a pair that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.errors import PlanError
from prunepass.graph.inputs import ModelInputs, input_name
from prunepass.plan import Protect

__all__ = ["TYPES_NAME", "check_readable", "may_leave", "named_tokens", "types_of"]

#: what models call the input that says which segment of a pair a token belongs to
TYPES_NAME = "token_type_ids"


def named_tokens(protect: Protect, ids: Tensor | None, types: Tensor | None, alive: Tensor | None) -> Tensor | None:
    """[B, S] bool: the tokens protected by id or by segment; None where the plan names neither.

    Args:
        ids: [B, S] token ids, where the model gets them.
        types: [B, S] token_type_ids, where the model gets them: 0 is the first segment, anything else the second.
        alive: [B, S] bool; None where all tokens are live.
    """
    named = None
    if protect.token_ids and ids is not None:
        named = _any_of(ids, protect.token_ids)
    if protect.segment is None:
        return named
    segment = _segment(protect, ids, types, alive)
    return segment if named is None else named | segment


def may_leave(protect: Protect, ids: Tensor | None, protected: Tensor, alive: Tensor | None) -> Tensor | None:
    """[B, S] bool: the tokens that may leave, by ``protect.only_ids``; None where that names none.

    Args:
        ids: [B, S] token ids, where the model gets them.
        protected: [B, S] int64, zero at tokens that nothing else protects.
        alive: [B, S] bool; None where all tokens are live.
    """
    if isinstance(protect.only_ids, str) or not protect.only_ids or ids is None:
        return None
    return _live(_any_of(ids, protect.only_ids) & (protected == 0), alive)


def _segment(protect: Protect, ids: Tensor | None, types: Tensor | None, alive: Tensor | None) -> Tensor:
    """[B, S] bool: the tokens of the protected segment. A row of one segment has none: there is no pair in it."""
    if types is not None:
        second = _live(types != 0, alive)
        first = types == 0
        content = second
    else:
        assert ids is not None
        separators = _live(_any_of(ids, protect.token_ids), alive)
        # summed as whole numbers: OpenVINO counts flags in 8 bits
        up_to = torch.cumsum(separators.to(torch.int64), dim=1)
        first = up_to - separators.to(torch.int64) == 0  # the first separator ends the first segment
        second = _live(~first, alive)
        content = second & ~separators
    is_pair = content.to(torch.int64).sum(dim=1, keepdim=True) > 0
    return (first if protect.segment == "first" else second) & is_pair


def _any_of(ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token_id in wanted:
        found = found | (ids == token_id)
    return found


def _live(chosen: Tensor, alive: Tensor | None) -> Tensor:
    return chosen if alive is None else chosen & alive


def types_of(inputs: ModelInputs) -> Node | None:
    """The placeholder of token_type_ids, [B, S]; None where the graph takes none."""
    return next((node for node in inputs.sequence if input_name(node) == TYPES_NAME), None)


def check_readable(protect: Protect, inputs: ModelInputs) -> None:
    """Raise `PlanError` where the graph has no inputs to tell the protected tokens by."""
    if protect.restricts and inputs.prompt is None:
        raise PlanError(
            "The plan says that only tokens of some ids may leave (Protect.only_ids), which is for the image tokens of "
            "a vision-language model called with images, and this is another model, or a call of text alone. "
            "Protect tokens by id with Protect(token_ids=...), or leave only_ids out."
        )
    if inputs.made_from is not None and protect.by_content:
        asked = "token ids" if protect.token_ids else f"the {protect.segment} segment of a pair"
        raise PlanError(
            f"The plan protects {asked}, but the model makes its tokens of {input_name(inputs.made_from)}, which has "
            "none. Protect by position: Protect(first=..., last=...)."
        )
    if protect.token_ids and inputs.token_ids is None:
        raise PlanError(
            "The plan protects token ids, but the model gets inputs_embeds, so there are no ids to look at. Pass "
            "input_ids, or protect by position."
        )
    if protect.segment is not None and types_of(inputs) is None and not protect.token_ids:
        raise PlanError(
            f"The plan protects the {protect.segment} segment of a pair, but the model gets no {TYPES_NAME}, and the "
            "plan names no separator. Pass token_type_ids in the example inputs, or name the separator's id: "
            f'Protect(segment="{protect.segment}", token_ids=(tokenizer.sep_token_id,)).'
        )
