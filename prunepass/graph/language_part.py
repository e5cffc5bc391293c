"""The language model of a vision-language model as a module of its own: embeddings that images were put into come in.

What becomes of images depends on their number and size, so the outer model is seldom one graph. Its call of the
language model is: embeddings, masks and positions, whose first axes are the batch and the length.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.errors import CaptureError, OptionError, RefusalError
from prunepass.graph.capture import Captured, capture_exported, export_module
from prunepass.graph.examples import checked
from prunepass.graph.implementations import refuse_implementation
from prunepass.graph.prompts import mark_prompt
from prunepass.graph.wrappers import refuse_pruned

__all__ = [
    "CallReader",
    "LanguagePart",
    "add_states",
    "by_name",
    "capture_part",
    "masks_by_index",
    "replaced",
    "spread_states",
]

#: states that early layers add at an image's tokens (DeepStack): what the decoder calls them, and where they go
_STATES, _WHERE = "deepstack_visual_embeds", "visual_pos_masks"
#: inputs of the outer model that its masks are made of besides the attention mask
_BESIDE = ("token_type_ids",)
#: arguments of the decoder that are given in another form, or say nothing of its values
_OTHERWISE = ("position_ids", "input_ids", "inputs_embeds", _STATES, _WHERE, "use_cache", "return_dict", "image_sizes")
#: inputs of the outer model that the part has no place for
_NOT_TAKEN = (
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "use_cache",
)


class LanguagePart(nn.Module):
    """The outer model called with embeddings: its language model and its head. What `nn.Module.compile` made of the
    outer model is passed by.

    Args:
        model, decoder: the outer model and the language model in it.
        marked: whether the graph says what is known of the prompt, for the passes.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, *, marked: bool = True) -> None:
        super().__init__()
        self.model, self.config, self._marked = model, model.config, marked
        self._decoder = (decoder,)  # it is in the model: no second name for its weights

    def forward(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **beside: Any,
    ) -> Any:
        """What the outer model returns, without what it says of images.

        Args:
            inputs_embeds: [B, S, D] floating, with the features of images in place.
            input_ids: [B, S] int64, which say where images are; nothing else reads them.
            attention_mask: [B, S], non-zero at live tokens.
            position_ids: [B, S] int64, or [B, S, n] of several kinds (time, height, width).
            past_key_values, use_cache, logits_to_keep, return_dict: of the outer model.
            beside: [B, S, ...] tensors: ``token_type_ids``; ``deepstack_visual_embeds_0``, ..., [B, S, D].
        """
        states = [beside.pop(name) for name in sorted(beside, key=_number) if name.startswith(_STATES)]
        if self._marked:
            inputs_embeds = mark_prompt(inputs_embeds, input_ids, attention_mask, [])
        positions = position_ids.movedim(-1, 0) if position_ids.dim() == 3 else position_ids
        given: dict[str, Any] = {"past_key_values": past_key_values} if past_key_values is not None else {}
        given |= {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        with ExitStack() as stack:
            if states:
                stack.enter_context(_with_states(self._decoder[0], states))
            return self.model._call_impl(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=use_cache,
                return_dict=return_dict,
                **given,
                **beside,
            )


@dataclass(frozen=True)
class CallReader:
    """Runs an outer model as far as its language model, and says what `LanguagePart` is to be called with.

    Attributes:
        model, decoder: as in `LanguagePart`.
        states: how many layers add states at an image's tokens.
        kinds: how many positions a token has with images, such as time, height and width; 0 for one without an axis.
    """

    model: nn.Module
    decoder: nn.Module
    states: int = 0
    kinds: int = 0

    @classmethod
    def of(
        cls, model: nn.Module, decoder: nn.Module, example: Mapping[str, Any]
    ) -> tuple[CallReader, dict[str, Tensor]]:
        """A reader, and the call of the part that an example leads to.

        Raises:
            RefusalError: the language model is called with something that is not made of what the part gets.
        """
        reader = cls(model, decoder)
        given, reached = reader._reach(example)
        positions = reached.get("position_ids")
        kinds = positions.shape[0] if isinstance(positions, Tensor) and positions.dim() == 3 else 0
        reader = cls(model, decoder, len(reached.get(_STATES) or ()), kinds)
        call = reader._call(given, reached)
        with masks_by_index():
            again = _reached(decoder, lambda: LanguagePart(model, decoder, marked=False)(**call))
        for name in reached.keys() - {*_OTHERWISE}:
            if not _same(reached[name], again.get(name)):
                raise RefusalError(
                    f"{type(model).__name__} gives its language model {name}, which it does not make of embeddings, "
                    "attention mask and positions alone, so the language model could not be traced by itself.",
                    hint="Prune it as generate() runs it: model.compile(backend='tokprune', options=...).",
                )
        return reader, call

    def read(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The call of the part for a call of the outer model.

        Raises:
            OptionError: there are no ``input_ids``, or something is asked for that the part has no place for.
        """
        return self._call(*self._reach(kwargs, *args))

    def _reach(self, kwargs: Mapping[str, Any], *args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The outer model's inputs by name, and the decoder's."""
        given = by_name(inspect.signature(self.model.forward), args, kwargs)
        for name in _NOT_TAKEN:
            value = given.pop(name, None)
            if value is not None and not (isinstance(value, (bool, int)) and not value):
                raise OptionError(
                    f"A vision-language model that is pruned with its images takes no {name}: it gives the logits of "
                    "all tokens. For generation use model.compile(backend='tokprune', options=...)."
                )
        if not isinstance(given.get("input_ids"), Tensor):
            raise OptionError(
                f"{type(self.model).__name__} is pruned by which of its tokens are an image's, which input_ids say. "
                "Pass input_ids, and pixel_values for the images."
            )
        return given, _reached(self.decoder, lambda: self.model._call_impl(**given, use_cache=False))

    def _call(self, given: Mapping[str, Any], reached: Mapping[str, Any]) -> dict[str, Tensor]:
        embeds: Tensor = reached["inputs_embeds"]
        ids: Tensor = given["input_ids"]
        mask, positions = given.get("attention_mask"), reached.get("position_ids")
        if not isinstance(positions, Tensor):
            positions = torch.arange(ids.shape[1], device=embeds.device)[None]
        if self.kinds and positions.dim() == 2:  # text alone
            positions = positions.expand(self.kinds, *positions.shape)
        kinds = positions.movedim(0, -1) if positions.dim() == 3 else positions
        call = {
            "inputs_embeds": embeds,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
            "position_ids": kinds.expand(ids.shape[0], *kinds.shape[1:]).contiguous(),
        }
        call |= {name: given[name] for name in _BESIDE if given.get(name) is not None}
        states = reached.get(_STATES) or [None] * self.states
        for i, one in enumerate(states):
            call[f"{_STATES}_{i}"] = spread_states(embeds, reached.get(_WHERE), one)
        return call


def spread_states(embeds: Tensor, where: Tensor | None, states: Tensor | None) -> Tensor:
    """[B, S, D] of states at an image's tokens, zeros at the others: those a pass can follow.

    Args:
        embeds: [B, S, D], for shape, dtype and device.
        where: [B, S] bool, the tokens of images; None where there are none.
        states: [tokens of images, D].
    """
    spread = embeds.new_zeros(embeds.shape)
    if where is not None and states is not None:
        spread[where.to(embeds.device)] = states.to(embeds)
    return spread


def add_states(hidden: Tensor, where: Any, states: Tensor) -> Tensor:
    """In place of the decoder's own method, for states that are spread already."""
    return hidden + states


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A module has another function for one of its methods meanwhile."""
    before = module.__dict__.get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            setattr(module, name, before)


@contextmanager
def masks_by_index() -> Iterator[None]:
    """Within it transformers makes each mask from indices that broadcast.

    Some masks (Gemma 3's) it makes with vmap, of which torch.export writes down operators that run inside vmap alone.
    """
    masking = sys.modules.get("transformers.masking_utils")
    table = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", {})
    before = {name: table[name] for name in ("sdpa", "eager") if name in table}
    for name, make in before.items():
        table[name] = partial(_without_vmap, make)
    try:
        yield
    finally:
        for name, make in before.items():
            table[name] = make


def _without_vmap(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, "use_vmap": False} if "use_vmap" in kwargs else kwargs)


@contextmanager
def _with_states(decoder: nn.Module, states: list[Tensor]) -> Iterator[None]:
    forward = decoder.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, _STATES: states})

    with replaced(decoder, "forward", call), replaced(decoder, "_deepstack_process", add_states):
        yield


def capture_part(
    model: nn.Module, decoder: nn.Module, example: Any, *, marked: bool = True
) -> tuple[Captured, LanguagePart, CallReader]:
    """Trace the language model of a vision-language model, as it is called for an example with images.

    Args:
        decoder: the language model in ``model``.
        example: keyword arguments of ``model``.
        marked: as in `LanguagePart`.

    Raises:
        OptionError: they are no inputs of the model, or ``input_ids`` are not among them.
        RefusalError: the language model cannot be called by itself; it is pruned already, or its attention cannot be
            read.
        CaptureError: it could not be traced.
    """
    refuse_pruned(model)
    refuse_implementation(model)
    _, given = checked(model, example)
    with torch.no_grad():
        reader, call = CallReader.of(model, decoder, given)
    part = LanguagePart(model, decoder, marked=marked)
    with masks_by_index():
        return capture_exported(export_module(part, (), call)), part, reader


class _Reached(BaseException):
    """The decoder is called; what would follow is not run. No `Exception`, so that no handler on the way takes it."""


def _reached(decoder: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """What the first call of the decoder gets, by name."""
    names, thread = inspect.signature(decoder.forward), threading.get_ident()
    found: dict[str, Any] = {}

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread:
            found.update(by_name(names, args, kwargs))
            raise _Reached

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        return found
    finally:
        handle.remove()
    raise CaptureError("The model did not call its language model on these inputs, so there is nothing to prune.")


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same values; what is no tensor and holds none is not looked at."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and all(_same(value, b.get(key)) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return not isinstance(a, Tensor) or (isinstance(b, Tensor) and torch.equal(a, b))


def _number(name: str) -> tuple[int, str]:
    end = name.rpartition("_")[2]
    return (int(end) if end.isdigit() else -1, name)


def by_name(names: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, those of ``**kwargs`` among them."""
    try:
        given = names.bind_partial(*args, **kwargs).arguments
    except TypeError as e:
        raise OptionError(f"The model does not take these inputs: {e}.") from None
    extra = given.pop("kwargs", {})
    return {**given, **extra}
