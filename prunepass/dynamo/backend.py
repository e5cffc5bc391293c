"""The torch.compile backend ``tokprune``: prune Dynamo's graph, then hand it to a target.

Found through the entry point group ``torch_dynamo_backends``, so nothing needs importing::

    torch.compile(model, backend="tokprune", options={"plan": "folder", "target": "openvino"})
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.dynamo import calls as dynamo_calls
from prunepass.dynamo import encoders as dynamo_encoders
from prunepass.dynamo import lookups as dynamo_lookups
from prunepass.dynamo import parts as dynamo_parts
from prunepass.dynamo.caller import bound_to_folder, model_of
from prunepass.errors import CaptureError, ContractError, OptionError, RefusalError
from prunepass.generation import attention as generation
from prunepass.generation.decode import Decode
from prunepass.graph import experts
from prunepass.graph.prompts import drop_prompt
from prunepass.plan import Protect, PrunePlan, unknown_key
from prunepass.plan.choice import SHORT, AnyPlans, Choice, check_short, choose
from prunepass.plan.draft import Several
from prunepass.plan.levels import chosen_level

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from prunepass.backends import Target
    from prunepass.dynamo.decoding import Following
    from prunepass.passes.result import PruneResult
    from prunepass.plan.annotations import Leave, Restore

__all__ = ["Compilation", "Options", "compilations", "tokprune"]

logger = logging.getLogger(__name__)

_FALLBACKS = ("error", "dense")


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may say.

    Args:
        plan: a folder written by ``save_pretrained``, the name of a plan that comes with prunepass
            (`plan_files.shipped`), JSON text, its mapping, a `PrunePlan`, or "default". Read at every compilation.
            Where no option describes a plan, the one in the folder that the model was loaded from is taken, and where
            there is none, the default one. A compiled function does not tell which model it calls: name the folder.
            A list of plans compiles a graph for each and one that keeps all tokens; `prunepass.level` says which of
            them a call runs, 1 by default. For a vision-language model also a mapping of streams to plans,
            ``{"vision_tower": ..., "language_model": ...}``, by the path of a module or its end; each value is one of
            the above, but no list. A part that is not named keeps all of its tokens.
        keep: short form of a plan, with ``layers``: the share of the arriving tokens that each listed layer keeps,
            or a list with each layer's share of the original ones.
        layers: 0-based blocks before which tokens leave.
        scorer: scorer of the short form, or of the default plan.
        protect: protected tokens of the short form, or of the default plan: ``{"first": 1, "token_ids": [102]}``.
        restore: what pruned positions of an output carry, in the short form or the default plan: "last", "mean",
            "zeros", or "none" for outputs without them, see `PrunePlan`. Where left out, "mean" for models whose
            outputs are states of all tokens, or a mean of them, and "last" for the others.
        leave: how tokens leave in the short form or the default plan: "drop" or "merge", see `Stage`.
        target: runtime that runs the pruned graph: a name, or an object of one's own (see `prunepass.backends`).
        fallback: "error" raises where a graph cannot be pruned; "dense" runs it unpruned, warns once, and shows in
            `compilations`.
        config: the target's own settings.
        decode: cut the caches of pruned layers again while tokens are generated: ``{"every": 64, "keep": 0.5}`` keeps
            half of all tokens seen (or, given a whole number, as many tokens) after every 64 new ones, by the scores of
            the plan's own predictors. ``{"every": None}`` keeps the scores alone, for `prunepass.compress_cache`.
        later_turns: whether calls of several tokens that go on from a cache are pruned, too: further turns of a chat,
            and the chunks of a prompt that ``prefill_chunk_size`` cuts. What was cached stays as it is; shares and
            protected tokens are counted on the tokens that the call brings.
        cache_dir: folder that keeps converted models from one process to the next, for the targets "openvino" and
            "onnxruntime"; where left out, the one that the environment variable ``PRUNEPASS_CACHE`` names, or none.

    Raises:
        OptionError: a value that cannot be; `parse` raises it for unknown keys too.
        PlanError: the plan is wrong or not there.
    """

    plan: AnyPlans = None
    keep: Any = None
    layers: Sequence[int] | None = None
    scorer: Any = None
    protect: Protect | Mapping[str, Any] | None = None
    restore: Restore | None = None
    leave: Leave | None = None
    target: str | Target = "inductor"
    fallback: str = "error"
    config: Mapping[str, Any] = field(default_factory=dict)
    decode: Decode | Mapping[str, Any] | None = None
    later_turns: bool = False
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        check_short(self.plan, self.short)
        if self.decode is not None and not isinstance(self.decode, Decode):
            object.__setattr__(self, "decode", Decode.parse(self.decode))
        if not isinstance(self.later_turns, bool):
            raise OptionError(f"Option 'later_turns' must be True or False, not {self.later_turns!r}.")
        if isinstance(self.plan, (list, tuple)) and (self.decode is not None or self.later_turns):
            what = "decode" if self.decode is not None else "later_turns"
            raise OptionError(f"Option {what!r} goes with a single plan. Give one, or leave {what!r} out.")
        if self.fallback not in _FALLBACKS:
            raise OptionError(f"Option 'fallback' must be 'error' or 'dense', not {self.fallback!r}.")
        if self.cache_dir is not None and self.target in ("inductor", "eager"):
            raise OptionError(
                f"Option 'cache_dir' is for the targets 'openvino' and 'onnxruntime', not {self.target!r}. "
                "Inductor has a cache of its own; the environment variable TORCHINDUCTOR_CACHE_DIR names its folder."
            )
        if not isinstance(self.cache_dir, (str, Path, type(None))):
            raise OptionError(f"Option 'cache_dir' must be a folder, not {self.cache_dir!r}.")

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from what torch.compile was given. Unknown keys raise `OptionError` with the nearest name."""
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionError(f"options must be a mapping such as {{'plan': 'folder'}}, not {options!r}.")
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise OptionError(unknown_key(key, known, "the options of backend 'tokprune'"))
        return cls(**options)

    @property
    def target_name(self) -> str:
        """For messages."""
        return self.target if isinstance(self.target, str) else type(self.target).__name__

    @property
    def leaves_the_plan_open(self) -> bool:
        """Whether nothing is said of a plan, so that one beside the model is taken."""
        return self.plan is None and not self.short

    @property
    def short(self) -> dict[str, Any]:
        """The options that describe a plan, in place of ``plan``."""
        return {name: value for name in SHORT if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, repr=False)
class Compilation:
    """What became of one graph that torch.compile handed over.

    Attributes:
        target: the runtime it went to.
        plan: the plan asked for; None where it was left to the model and the graph was not read: one that was refused,
            one token, or a call that goes on from a cache.
        result: the rewriting; None where the graph runs unpruned.
        refusal: why it runs unpruned (with ``fallback="dense"``).
    """

    target: str
    plan: PrunePlan | None
    result: PruneResult | None
    refusal: str | None = None

    def __repr__(self) -> str:
        return f"Compilation({' '.join(str(self).split())})"

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"unpruned on {self.target}: {self.refusal}"
        stages = len(self.result.sites) if self.result is not None else 0
        if self.result is not None and not stages and self.result.changes.get("hoist"):
            return f"unpruned on {self.target}, without what no result needs"
        if not stages:
            return f"unpruned on {self.target}: a plan that keeps all, one token, or a call that goes on from a cache"
        return f"pruned in {stages} stages on {self.target}"


_compilations: deque[Compilation] = deque(maxlen=64)
_warned: set[str] = set()


def compilations() -> tuple[Compilation, ...]:
    """The graphs compiled by ``tokprune`` in this process, oldest first (the last 64)."""
    return tuple(_compilations)


def tokprune(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend for `torch.compile`: prune ``gm`` and lower it to the target.

    Compile the module whose ``forward`` runs. A wrapper's ``generate()`` calls the model inside it (PEFT's does), which
    compiling the wrapper leaves as it was: compile ``peft_model.get_base_model()``.

    Args:
        gm: Dynamo's graph.
        example_inputs: one value a placeholder.
        options: see `Options`. None takes the plan in the model's folder, or the default one, and Inductor.
        mode: one of Inductor's, such as "reduce-overhead", with no plan named: torch.compile takes no options beside a
            mode. With options, give ``"config": torch._inductor.list_mode_options(mode)``.

    Raises:
        OptionError, PlanError: the options or the plan are wrong.
        RefusalError: the graph cannot be pruned soundly (unless ``fallback`` is "dense"). torch.compile shows it inside
            a ``BackendCompilerFailed``, whose ``inner_exception`` it is.
    """
    from prunepass.backends import get_target

    settings = Options.parse(options) if mode is None else Options(config=_mode_options(mode))
    target = get_target(settings.target)
    model = model_of([*example_inputs, *gm.parameters()]) if settings.leaves_the_plan_open else None
    choice = choose(settings.plan, model, settings.short)
    if isinstance(choice.plan, Several):
        plans = (PrunePlan(()), *choice.plan.plans)
        parts = [Choice(plan, f"plan {i} of {choice.source}") for i, plan in enumerate(plans)]
        lowered = _by_level([_lowered(gm, example_inputs, settings, part, target) for part in parts])
    else:
        lowered = _lowered(gm, example_inputs, settings, choice, target)
    if not dynamo_calls.watched():
        _warn_once(
            "A graph came from a backend that wraps 'tokprune'. Calls of it that Dynamo runs without a graph, "
            "unpruned, cannot be noticed: give torch.compile backend='tokprune' itself."
        )
    if settings.leaves_the_plan_open:
        lowered = bound_to_folder(lowered, example_inputs, choice.folder)
    return dynamo_calls.marked(lowered)


def _by_level(lowered: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The graph of level 0, 1, ..., whichever `prunepass.level` says at the call."""

    def run(*args: Any) -> Any:
        return lowered[chosen_level(len(lowered) - 1)](*args)

    return run


def _lowered(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Options, choice: Choice, target: Target
) -> Callable[..., Any]:
    """One graph, pruned by one plan, on its target."""
    from prunepass.backends import cache
    from prunepass.generation.follow import with_empty_padding
    from prunepass.passes.cached import goes_on_from_cache

    following = _following(settings)
    states = dynamo_encoders.states_given(gm)
    unpruned = Compilation(settings.target_name, None, None)
    compilation = _prune(gm, settings, choice, following) if states is None else unpruned
    graph = compilation.result.graph_module if compilation.result is not None else gm
    drop_prompt(graph)
    lookups = dynamo_lookups.Lookups.of(graph)
    with cache.using(settings.cache_dir):
        lowered = target.lower(graph, example_inputs, config=settings.config)
    lowered = dynamo_lookups.checked(lowered, lookups, before=getattr(target, "UNCHECKED_LOOKUPS", False))
    _compilations.append(compilation)  # not before: Inductor may ask Dynamo to trace again
    if compilation.result is not None and not compilation.result.sites and goes_on_from_cache(graph):
        lowered = with_empty_padding(lowered, graph)
    if following is not None and compilation.result is not None:
        lowered = following.of(lowered, dense=settings.fallback == "dense")
    if compilation.result is not None and compilation.result.returns_caches:
        lowered = _installing(lowered, compilation.result)
    if compilation.result is not None:
        lowered = dynamo_encoders.marking(lowered, compilation.result)
    elif states is not None:
        lowered = dynamo_encoders.checking(lowered, states, dense=settings.fallback == "dense")
    return lowered


def _installing(lowered: Callable[..., Any], result: PruneResult) -> Callable[..., Any]:
    """Where transformers was imported after this module, and where caches have empty slots: before the call that comes
    next is traced, and not while this one is, whose guards may hang on what is registered."""
    spreads = result.spreads_caches

    def run(*args: Any) -> Any:
        generation.install()
        if spreads:
            generation.expect_empty_slots()
        return lowered(*args)

    return run


def _prune(gm: GraphModule, settings: Options, choice: Choice, following: Following | None) -> Compilation:
    from prunepass.graph.capture import ensure_aten
    from prunepass.graph.implementations import refuse_running_implementation
    from prunepass.passes.default_plan import head_warning
    from prunepass.pipeline import prune_graph

    given = choice.plan if isinstance(choice.plan, PrunePlan) else None
    try:
        refuse_running_implementation()
        dynamo_parts.refuse(gm)
        with dynamo_parts.fixed_cache_blamed(gm), dynamo_parts.blamed(gm), choice.blamed():
            aten = ensure_aten(gm)
            if following is None:
                result = prune_graph(aten, choice.plan, exact=True)
            else:
                result = following.prune(aten, choice.plan)
        dynamo_parts.refuse_own_attention(result)
        dynamo_parts.refuse_single_block(gm, result)
        dynamo_parts.refuse_decoder_alone(result, choice.plan)
        told = result.inputs is not None and result.inputs.prompt is not None  # its outer model reads the last token
        if result.restored and not told and (warning := head_warning(result.plan, result.reads)):
            _warn_once(warning)
        return Compilation(settings.target_name, result.plan if result.blocks else given, result)
    except (RefusalError, CaptureError, ContractError) as e:
        if settings.fallback == "error":
            raise
        _warn_once(f"A graph runs unpruned, as fallback='dense' asks: {e}")
        return Compilation(settings.target_name, given, None, refusal=str(e))


def _following(settings: Options) -> Following | None:
    from prunepass.dynamo.decoding import Following

    decode = settings.decode if isinstance(settings.decode, Decode) else None
    return Following(decode, settings.later_turns) if decode is not None or settings.later_turns else None


def _mode_options(mode: str) -> Mapping[str, Any]:
    """Inductor's settings of a mode."""
    import torch._inductor

    known: Mapping[str, Mapping[str, Any]] = torch._inductor.list_mode_options()
    if mode not in known:
        raise OptionError(f"mode must be one of Inductor's, {', '.join(known)}, not {mode!r}.")
    return dict(known[mode])


def _warn_once(message: str) -> None:
    if message in _warned:
        return
    _warned.add(message)
    logger.warning("%s", message)


def _report_call(reason: str, options: Mapping[str, Any]) -> None:
    """A call that ran without a graph of ours, and is not to raise."""
    _warn_once(f"A call ran unpruned: {reason}")
    _compilations.append(Compilation(Options.parse(options).target_name, None, None, refusal=reason))


def _watch_model(compiled: dynamo_calls.Compiled, options: Mapping[str, Any]) -> dynamo_calls.Inside | None:
    """Called by torch.compile with what it compiles, before a call of it is traced."""
    experts.install(dynamo_calls.watched)
    generation.install()
    model = compiled.module
    if (vision := _vision(compiled, options)) is not None:
        return vision
    if compiled.method is not None:  # in place
        dynamo_encoders.compile_encoder(model, options)
    inside = getattr(model, "get_base_model", None)
    if not callable(inside) or not hasattr(model, "generate"):
        return None
    logger.warning(
        "%s.generate() calls the model inside it, which compiling the %s leaves unpruned. To prune what is generated, "
        "compile that one: model.get_base_model().compile(backend='tokprune', options=...).",
        type(model).__name__,
        type(model).__name__,
    )
    return None


def _vision(compiled: dynamo_calls.Compiled, options: Mapping[str, Any]) -> dynamo_calls.Inside | None:
    """How calls of a vision-language model run; None for other models, and where another stream is pruned."""
    from prunepass.dynamo.vision import compiled_vision

    return compiled_vision(compiled, options, Options.parse, _warn_once)


def _reset() -> None:
    """Called by ``torch.compiler.reset``."""
    _compilations.clear()
    _warned.clear()


generation.install()  # best before models are traced, which look their attention up then
dynamo_calls.install(tokprune, _report_call, _watch_model)
tokprune.reset = _reset  # type: ignore[attr-defined]  # where torch looks for it: an attribute of the function
