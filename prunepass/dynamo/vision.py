"""Vision-language models: what torch.compile prunes of them is the language model inside.

The outer model computes features of images, puts them in place of the image tokens' embeddings, and calls its language
model with those. That call is one graph, a prompt's or a decoding step's. The outer one runs as it is: what becomes of
images depends on their number and size. While it runs, the language model's ``forward`` is ours, and so is the outer
one, which hands the token ids down. A tower that reads images is one graph as well, where a plan names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from prunepass.dynamo.calls import Compiled, Inside
from prunepass.dynamo.towers import compiled_towers, put_in_place
from prunepass.errors import OptionError, RefusalError
from prunepass.generation import attention as generation
from prunepass.graph.language_part import add_states, by_name, replaced, spread_states
from prunepass.graph.prompts import mark_prompt
from prunepass.graph.vision import language_model_of
from prunepass.passes.live import maximum
from prunepass.plan import PrunePlan, protected_last, share_of
from prunepass.plan.by_stream import StreamPlans, plans_by_stream
from prunepass.plan.choice import choose, names_streams
from prunepass.plan.draft import Draft
from prunepass.plan.images import image_plan

__all__ = ["VisionLanguage", "compiled_vision"]

_PLAIN = PrunePlan(())
Warn = Callable[[str], None]


@dataclass(frozen=True)
class _Outer:
    """What the outer call was given."""

    ids: Tensor | None = None
    mask: Any = None
    drafts: int = 0  # tokens at the end whose logits are asked for


_NOTHING = _Outer()


class _Part(nn.Module):
    """The language model, whose graph says what is known of the prompt."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, told: tuple[Tensor, Tensor, list[int]] | None, **given: Any) -> Any:
        if told is not None:
            given["inputs_embeds"] = mark_prompt(given["inputs_embeds"], *told)
        return type(self.decoder).forward(self.decoder, **given)


class VisionLanguage:
    """One vision-language model, compiled.

    Args:
        compiled: what ``torch.compile`` got, the outer model among it.
        decoder: the language model in it.
        options: of ``torch.compile``.
        settings: the same, read: `dynamo.backend.Options`.
        warn: takes what is to be said once.

    Raises:
        OptionError: options that are for other models.
        PlanError: the plan is wrong, or nothing says which tokens are an image's.
    """

    def __init__(
        self,
        compiled: Compiled,
        decoder: nn.Module,
        options: Mapping[str, Any],
        settings: Any,
        warn: Warn,
    ) -> None:
        model, dynamic = compiled.module, compiled.dynamic
        for name in ("decode", "later_turns"):
            if getattr(settings, name):
                raise OptionError(
                    f"The option {name!r} is for language models alone, and {type(model).__name__} has one inside that "
                    f"sees images. Leave {name!r} out."
                )
        self._model, self._decoder, self._warn = model, decoder, warn
        plans = _plans(settings, model)
        language = PrunePlan(()) if plans.language is None else plans.language.plan
        self._plan = _PLAIN if plans.language is None else image_plan(language, model)
        self._named = _names_ids(language)
        shared = {name: options[name] for name in ("target", "fallback", "config", "cache_dir") if name in options}
        self._pruned, self._plain = (
            torch.compile(_Part(decoder), backend="tokprune", dynamic=dynamic, options={**shared, "plan": p})
            for p in (self._plan, _PLAIN)
        )
        self._towers = compiled_towers(model, plans.towers, shared, dynamic)
        if compiled.method is not None:
            put_in_place(model, self._towers)
        self._outer: ContextVar[_Outer] = ContextVar("prunepass_outer", default=_NOTHING)
        self._lock, self._open, self._patches = Lock(), 0, ExitStack()

    @contextmanager
    def called(self) -> Iterator[None]:
        """While the outer model is called, by any number of threads."""
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._patch()
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._patches.close()

    def _patch(self) -> None:
        outer: Callable[..., Any] = torch._dynamo.disable(self._of_outer(self._model.forward))
        self._patches.enter_context(replaced(self._model, "forward", outer))
        self._patches.enter_context(replaced(self._decoder, "forward", self._of_decoder(self._decoder.forward)))
        if hasattr(self._decoder, "_deepstack_process"):
            self._patches.enter_context(replaced(self._decoder, "_deepstack_process", add_states))
        for tower, compiled in self._towers.items():
            self._patches.enter_context(replaced(tower, "_compiled_call_impl", compiled))

    def _of_outer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = by_name(names, args, kwargs)
            drafts = given.get("logits_to_keep")
            told = _Outer(given.get("input_ids"), given.get("attention_mask"), drafts if isinstance(drafts, int) else 0)
            before = self._outer.set(told)
            try:
                return forward(*args, **kwargs)
            finally:
                self._outer.reset(before)

        return call

    def _of_decoder(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = _without_gaps(by_name(names, args, kwargs))
            embeds, past = given.get("inputs_embeds"), given.get("past_key_values")
            if past is not None and past.get_seq_length() > 0:
                found = self._plain(None, **given)
                _empty_padding(past, self._outer.get().mask, given)
                return found
            prompt = bool(self._plan.stages) and embeds is not None and embeds.shape[1] > 1
            told = self._told(given) if prompt else None
            return self._plain(None, **given) if told is None else self._pruned(told, **given)

        return call

    def _told(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, list[int]] | None:
        """What is known of a prompt; None where nothing of it may leave."""
        outer = self._outer.get()
        if outer.ids is None:
            raise RefusalError(
                "the vision-language model was called with inputs_embeds and without input_ids, so nothing says "
                "which tokens are an image's.",
                hint="Call it with input_ids, and with pixel_values for the images.",
            )
        mask = _live(outer.mask, given["inputs_embeds"])
        widths = self._widths(outer.ids, mask)
        if widths is None:
            return None
        if outer.drafts > 1 and given.get("use_cache") is not False:
            raise RefusalError(
                f"the model returns its key-value cache and logits of its last {outer.drafts} tokens, as drafting ones "
                "(assisted decoding) asks for. What is drafted in vain could not be taken out of shortened caches.",
                hint="Generate without an assistant or prompt lookup; for scores of several tokens call the model with "
                "use_cache=False.",
            )
        if given.get("attention_mask") is None:
            given["attention_mask"] = mask
        elif given["attention_mask"] is outer.mask and isinstance(outer.mask, Tensor) and outer.mask.dim() == 2:
            mask = outer.mask  # one input of the graph in place of two
        return outer.ids, mask, widths

    def _widths(self, ids: Tensor, mask: Tensor) -> list[int] | None:
        """How many slots each stage leaves; empty where all tokens may leave, None where none may."""
        protect = self._plan.protect
        if not protect.restricts:
            return []
        rank, live = torch.cumsum(mask != 0, 1) - 1, (mask != 0).sum(1, keepdim=True)
        leaving = torch.isin(ids, torch.tensor(protect.only_ids, device=ids.device)) & (mask != 0)
        if self._named and not bool(leaving.any()):
            self._warn(
                f"No token of the prompt has one of the ids of Protect.only_ids, {list(protect.only_ids)}: nothing of "
                "it is pruned."
            )
        leaving &= (rank >= protect.first) & (rank < live - protected_last(live, protect, maximum=maximum))
        if protect.token_ids:
            leaving &= ~torch.isin(ids, torch.tensor(protect.token_ids, device=ids.device))
        pairs = list(zip(live.flatten().tolist(), leaving.sum(1).tolist(), strict=True))
        if not any(count for _, count in pairs):
            return None
        widths = [max(n - c + share_of(c, stage.keep) for n, c in pairs) for stage in self._plan.stages]
        if max(widths, default=0) >= ids.shape[1]:
            generation.expect_empty_slots()  # where no slot goes, masks fit caches that have empty ones
        return widths


def _names_ids(plan: Any) -> bool:
    """Whether the user says which ids may leave."""
    protect = plan.given.get("protect") if isinstance(plan, Draft) else plan.protect
    return protect is not None and bool(protect.restricts)


def _live(mask: Any, embeds: Tensor) -> Tensor:
    """[B, S] int64, 1 at live tokens, of a mask [B, S] or of one of all pairs, in which live tokens see themselves."""
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    seen: Tensor = mask != 0
    if seen.dim() == 4:
        own: Tensor = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        seen = own if own.dtype == torch.bool else own == 0
    return seen.to(torch.int64).expand(embeds.shape[0], -1)


def _without_gaps(given: dict[str, Any]) -> dict[str, Any]:
    """States that are added at an image's tokens in early layers (DeepStack), [tokens of images, D], as [B, S, D] with
    zeros at the others': those a pass can follow."""
    extra, where = given.get("deepstack_visual_embeds"), given.get("visual_pos_masks")
    if extra is None or where is None:
        return given
    embeds: Tensor = given["inputs_embeds"]
    dense = [spread_states(embeds, where, states) for states in extra]
    return {**given, "deepstack_visual_embeds": dense}


def _empty_padding(past: Any, mask: Any, given: dict[str, Any]) -> None:
    """Zeros in the caches' last slots where a later call of several tokens has padding: a shortened cache says by that
    alone what tokens after it see."""
    tokens = given["inputs_embeds"].shape[1] if given.get("inputs_embeds") is not None else 1
    if tokens == 1 or not isinstance(mask, Tensor) or mask.dim() != 2 or bool((own := mask[:, -tokens:] != 0).all()):
        return
    for layer in past.layers:
        for states in (layer.keys, layer.values):
            count = min(tokens, states.shape[2])
            states[:, :, -count:] *= own[:, None, -count:, None].to(states)


def compiled_vision(
    compiled: Compiled, options: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Any], warn: Warn
) -> Inside | None:
    """What is to be entered during calls of a vision-language model that torch.compile was given; None for others.

    Args:
        parse: reads options.

    Raises:
        OptionError: one method of the model is compiled, whose calls of the language model cannot be led elsewhere.
        OptionError, PlanError: as `VisionLanguage`.
    """
    decoder = language_model_of(compiled.module)
    if decoder is None:
        return None
    settings = parse(options)
    stream = None if names_streams(settings.plan) else _stream(settings, compiled.module)
    if stream is not None and not any(m is decoder for name, m in compiled.module.named_modules() if name == stream):
        return None
    if compiled.method not in (None, "_call_impl"):
        raise OptionError(
            f"{type(compiled.module).__name__} is a vision-language model, of which the language model inside is "
            f"pruned. Compile the model, model.compile(backend='tokprune', options=...), not its {compiled.method}()."
        )
    return VisionLanguage(compiled, decoder, options, settings, warn).called


def _plans(settings: Any, model: nn.Module) -> StreamPlans:
    if names_streams(settings.plan):
        return plans_by_stream(settings.plan, model)
    return StreamPlans(choose(settings.plan, model, settings.short))


def _stream(settings: Any, model: nn.Module) -> str | None:
    return choose(settings.plan, model, settings.short).plan.stream
