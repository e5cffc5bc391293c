"""States of a pruned encoder on their way to its decoder: ``generate()`` gets a mask that is as short as they are.

With ``restore="none"`` an encoder returns the tokens that are left, and which slots hold one. The mask lies beside the
states, as an attribute of the tensor. ``generate()`` hands states and mask to the decoder in one place, before it
repeats both for beams; there the mask of the text is exchanged for that one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunepass.errors import RefusalError

__all__ = ["Marks", "install", "mark", "marks_of"]

_NAME = "prunepass_short"
_EXPAND = "_expand_inputs_for_generation"


@dataclass(frozen=True)
class Marks:
    """What is known of states that a pruned encoder returned.

    Attributes:
        mask: [B, K] int64, 1 at slots that hold a token; None where the states have their full length.
        told: whether the encoder read a mask; where it did not, each slot holds a token.
    """

    mask: Tensor | None = None
    told: bool = False


def mark(states: Tensor, marks: Marks) -> None:
    """Put what is known of an encoder's states beside them, for ``generate()``."""
    install()
    setattr(states, _NAME, marks)


def marks_of(states: Any) -> Marks | None:
    """What lies beside the states of an encoder; None where no pruned encoder returned them."""
    found: Marks | None = getattr(states, _NAME, None)
    return found


def _states(encoder_outputs: Any) -> Any:
    states = getattr(encoder_outputs, "last_hidden_state", None)
    return encoder_outputs[0] if states is None and isinstance(encoder_outputs, (tuple, list)) else states


def install() -> None:
    """Have ``generate()`` of transformers take the mask of short states, where transformers is in use.

    Raises:
        RefusalError: this version of transformers hands states to the decoder in another place.
    """
    if "transformers.generation.utils" not in sys.modules:
        return
    from transformers import GenerationMixin

    given: Any = vars(GenerationMixin).get(_EXPAND)
    function = getattr(given, "__func__", given)  # a static method in some versions
    if getattr(function, "prunepass", False):
        return
    if not callable(function):
        raise RefusalError(
            "this version of transformers repeats an encoder's states for beams in another way than prunepass knows, "
            "so that the decoder would not get the mask of the tokens that are left.",
            hint="Use a version that prunepass is tested with, or take restore='last'.",
        )
    wrapped = _expanding(function)
    setattr(GenerationMixin, _EXPAND, staticmethod(wrapped) if function is not given else wrapped)


def _expanding(given: Callable[..., Any]) -> Callable[..., Any]:
    def expand(*args: Any, **kwargs: Any) -> Any:
        marks = marks_of(_states(kwargs.get("encoder_outputs")))
        if marks is None:
            return given(*args, **kwargs)
        if marks.mask is not None:
            kwargs["attention_mask"] = _mask_for_decoder(marks, kwargs.get("attention_mask"))
        ids, expanded = given(*args, **kwargs)
        mark(_states(expanded["encoder_outputs"]), marks)  # repeated states are another tensor
        return ids, expanded

    expand.prunepass = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return expand


def _mask_for_decoder(marks: Marks, given: Tensor | None) -> Tensor | None:
    """The mask of short states; of an encoder that reads none, what was given is none of its tokens, unless all ones:
    Whisper's ``attention_mask``, which its decoder does not read either."""
    if marks.told or given is None or bool(given.all()):
        return marks.mask
    return given
