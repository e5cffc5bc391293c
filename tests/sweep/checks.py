"""One model type against the hook oracle: what became of it in `prune()` and in `generate()`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import harness
import hooks
import oracle
import prunepass
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import CaptureError, ContractError, PlanError, PruneError
from prunepass.graph.analysis import Analysis
from prunepass.graph.capture import capture_module
from sweep.models import LAYERS, NotBuiltError, build

PROTECT = Protect(first=1, last=1)
#: three stages; in models of several kinds of layers, which may be refused above the last one that mixes tokens in
#: another way than by attention, the last alone
PLANS = (
    PrunePlan((Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3)), "norm", PROTECT),
    PrunePlan((Stage(3, 0.4),), "norm", PROTECT),
)
TOLERANCE = 1e-9
PROMPT, STEPS = 23, 4


@dataclass(frozen=True)
class Found:
    """What became of one model type.

    Attributes:
        prune, generate: "right", "refused", "wrong", "raw" (an error that is none of ours), "untraced" (torch.export or
            Dynamo fails), "unbuilt", "dense" (the unpruned model itself fails) or "unchecked" (the oracle does not know
            its layers).
        prune_note, generate_note: the reason, or the largest difference.
    """

    model_type: str
    prune: str
    prune_note: str
    generate: str = "unchecked"
    generate_note: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def check(model_type: str, *, generate: bool = True) -> Found:
    """Build, prune and compare one type."""
    with oracle.float64_softmax():
        try:
            model = build(model_type)
        except NotBuiltError as e:
            return Found(model_type, "unbuilt", str(e)[:200], "unbuilt")
        prune, note = _pruned(model)
        if prune in ("dense", "unbuilt") or not generate:
            return Found(model_type, prune, note)
        return Found(model_type, prune, note, *_generated(model_type))


def inputs_of(model: nn.Module, lengths: list[int], side: str) -> dict[str, Tensor]:
    x = zoo.batch(lengths, seed=1, side=side)
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        x.pop("attention_mask")
    return x


def _pruned(model: Any) -> tuple[str, str]:
    x = inputs_of(model, [13, 9, 4], "right")
    try:
        harness.run(model, x)
    except Exception as e:  # whatever a model raises in transformers
        return "dense", _line(e)
    first: tuple[str, str] | None = None
    for plan, of_layers, depth in (*((plan, plan, LAYERS) for plan in PLANS), *_at_last_block(model)):
        try:
            module = prunepass.prune(model, plan, inputs_of(model, [11, 7], "right"))
        except CaptureError as e:
            return "untraced", _line(e)
        except ContractError as e:
            return "raw", _line(e)
        except PruneError as e:
            if first is None or not isinstance(e, PlanError):  # that the plan has another number of layers says little
                first = ("refused", _line(e))
            continue
        except Exception as e:  # the fault that is looked for
            return "raw", _line(e)
        outcome = _agreement(model, module, of_layers, depth)
        if first is not None and outcome[0] == "right":
            return "right", f"from layer {of_layers.stages[0].layer}: {first[1]}"
        return outcome
    assert first is not None
    return first


def _at_last_block(model: Any) -> Iterator[tuple[PrunePlan, PrunePlan, int]]:
    """A plan with one stage, before the last block; the same by the number of the layer that the block stands in, as in
    models of several kinds of layers those with attention alone are blocks; and how many layers there are up to it.
    Those behind it belong to the head, which reads pruned tokens again."""
    try:
        blocks = Analysis.of(capture_module(model, inputs_of(model, [11, 7], "right")).graph_module).blocks
    except PruneError:
        return
    number = re.search(r"\d+", blocks[-1].path)
    if number is not None and len(blocks) < LAYERS:
        plans = (PrunePlan((Stage(i, 0.4),), "norm", PROTECT) for i in (blocks[-1].index, int(number[0])))
        yield (*plans, int(number[0]) + 1)


def _agreement(model: Any, module: Any, plan: PrunePlan, depth: int) -> tuple[str, str]:
    worst = moved = 0.0
    for side in ("right", "left"):
        x = inputs_of(model, [13, 9, 4], side)
        live = x.get("attention_mask", torch.ones_like(x["input_ids"])).bool()
        dense = harness.run(model, x)
        if dense.logits[live].isnan().any():  # MPT, where padding stands on the left: there is nothing to compare with
            continue
        try:
            expected = hooks.run_hooked(model, _layers(model, x)[:depth], plan, x).output
        except Exception as e:  # a form of layers or of attention that the oracle does not know
            return "unchecked", _line(e)
        try:
            found = harness.run(module, x)
            worst = max(worst, harness.difference(found, expected, live))
            moved = max(moved, harness.difference(found, dense, live))
        except Exception as e:  # at other sizes than those it was traced at
            return "raw", _line(e)
    if moved < 1e-6:
        return "wrong", "the plan changes nothing"
    if _fits(model, worst):
        return "right", f"{worst:.1e}"
    if not _hand_on(model, inputs_of(model, [13, 9, 4], "right")):
        return "unchecked", "its layers are no modules, which the oracle needs"  # XLM has lists of their parts
    return "wrong", f"{worst:.1e}"


def _fits(model: Any, worst: float) -> bool:
    """Whether a difference from the oracle is rounding."""
    return worst < _tolerance(model) or worst < 3 * min(_traced_gap(model), 1e-5)


def _traced_gap(model: Any) -> float:
    """How far the unpruned model's trace is from the model: recurrences in float32 round otherwise there."""
    traced, worst = capture_module(model, inputs_of(model, [11, 7], "right")), 0.0
    for side in ("right", "left"):
        x = inputs_of(model, [13, 9, 4], side)
        live = x.get("attention_mask", torch.ones_like(x["input_ids"])).bool()
        found = harness.run(traced.graph_module, {name: x[name] for name in traced.inputs})
        logits = next(iter(harness.tensors(found).values()))  # the trace gives values without names
        worst = max(worst, float((logits - harness.run(model, x).logits)[live].abs().max()))
    return worst


def _hand_on(model: Any, x: dict[str, Tensor]) -> bool:
    """Whether each of the modules taken for layers gets what the one before has given."""
    given: list[Any] = []
    got: list[Any] = []
    handles = []
    for layer in hooks.layers_of(model, LAYERS):
        handles.append(layer.register_forward_pre_hook(lambda _, args: got.append(args[0] if args else None)))
        handles.append(layer.register_forward_hook(lambda _, __, out: given.append(out)))
    try:
        harness.run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    states = (out[0] if isinstance(out, tuple) else out for out in given[:-1])
    return all(one is None or torch.equal(one, state) for one, state in zip(got[1:], states, strict=True))


def _layers(model: Any, x: dict[str, Tensor]) -> list[nn.Module]:
    """The layers. Raises `NotBuiltError` where they run in several cycles: the oracle counts stages from the first one,
    the passes in the last."""
    layers = hooks.layers_of(model, LAYERS)
    calls: list[nn.Module] = []
    handles = [layer.register_forward_pre_hook(lambda one, _: calls.append(one)) for layer in dict.fromkeys(layers)]
    try:
        harness.run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) > len(layers):
        raise NotBuiltError(f"its {len(layers)} layers run {len(calls)} times")
    return layers


def _tolerance(model: Any) -> float:
    """1e-9, or more where the unpruned model itself rounds to float32 somewhere: what a row's neighbours change in it,
    thirty times, and no more than 1e-5."""
    x = inputs_of(model, [13, 9, 4], "right")
    together, worst = harness.run(model, x).logits, 0.0
    for row, length in enumerate((13, 9, 4)):
        alone = harness.run(model, {name: value[row : row + 1, :length] for name, value in x.items()}).logits
        worst = max(worst, float((alone - together[row : row + 1, :length]).abs().max()))
    return max(TOLERANCE, min(30 * worst, 1e-5))


def _generated(model_type: str) -> tuple[str, str]:
    """Greedy search with a pruned prompt, each step against the whole unpruned model that hides what was pruned."""
    try:
        exact, fast = build(model_type), build(model_type, use_cache=True)
    except NotBuiltError as e:
        return "unbuilt", str(e)[:200]
    outcome: tuple[str, str] = ("refused", "")
    for plan in PLANS:
        outcome = _steps(exact, fast, plan)
        if outcome[0] != "refused":
            return outcome
    return outcome


def _steps(exact: Any, fast: Any, plan: PrunePlan) -> tuple[str, str]:
    torch._dynamo.reset()
    fast.compile(backend="tokprune", options={"plan": plan, "target": "eager"})
    logits: list[Tensor] = []
    caches: list[Any] = []
    inner = fast._compiled_call_impl

    def record(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        logits.append(out.logits[:, -1])
        caches.append(getattr(out, "past_key_values", None))
        return out

    fast._compiled_call_impl = record
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (2, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ids[1, :6] = zoo.PAD
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": zoo.PAD, "eos_token_id": None}
    try:
        with torch.no_grad():
            rows = fast.generate(ids, attention_mask=mask, **options)
    except Exception as e:  # torch.compile wraps what a backend raises
        inside = getattr(e, "inner_exception", e)
        if isinstance(inside, PruneError):
            return "refused", _line(inside)
        return ("untraced" if type(e).__module__.startswith("torch._dynamo") else "raw"), _line(e)
    if caches[0] is None:
        return "unchecked", "each step runs on the whole row, as the model has no cache"
    worst = 0.0
    for step, found in enumerate(logits):
        x = {"input_ids": rows[:, : PROMPT + step]}
        x["attention_mask"] = torch.cat([mask, mask.new_ones(2, step)], 1)
        if "position_ids" in inspect.signature(exact.forward).parameters:
            x = zoo.with_positions(x)
        try:
            expected = hooks.run_hooked(exact, _layers(exact, x), plan, x, prompt=PROMPT).output
        except Exception as e:  # a form of layers or of attention that the oracle does not know
            return "unchecked", _line(e)
        worst = max(worst, float((found - expected.logits[:, -1]).abs().max().nan_to_num(nan=torch.inf)))
    if _fits(exact, worst):
        return "right", f"{worst:.1e}"
    if (own := _own_gap(exact, rows, mask)) > _tolerance(exact):
        return "unchecked", f"unpruned, its cached decoding is {own:.1e} away from that without a cache"
    return "wrong", f"{worst:.1e}"


def _own_gap(exact: Any, rows: Tensor, mask: Tensor) -> float:
    """How far the unpruned model with a cache is from itself without one, over the steps of a search."""
    torch._dynamo.reset()
    cached: Any = build(exact.config.model_type, use_cache=True)
    worst, past = 0.0, None
    for step in range(STEPS):
        length = PROMPT + step
        x = {"input_ids": rows[:, :length], "attention_mask": torch.cat([mask, mask.new_ones(2, step)], 1)}
        if "position_ids" in inspect.signature(exact.forward).parameters:
            x = zoo.with_positions(x)
        now = x if past is None else {n: v if n == "attention_mask" else v[:, -1:] for n, v in x.items()}
        with torch.no_grad():
            found = cached(**now, past_key_values=past, use_cache=True)
        past = found.past_key_values
        worst = max(worst, float((found.logits[:, -1] - harness.run(exact, x).logits[:, -1]).abs().max()))
    return worst


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    said = lines[0] if isinstance(error, PruneError) else f"{type(error).__name__}: {lines[0]}"
    return re.sub(r' \(File "[^)]*\)?', "", said)[:400]  # where a library lies on this machine is nobody's concern
