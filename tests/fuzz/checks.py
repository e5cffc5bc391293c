"""Running an episode: every call is compared with its reference, and each outcome counted."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import harness
import oracle
import zoo
from fuzz.cases import Call, Episode
from fuzz.ties import Choices
from fuzz.ways import captured, generated, model_of, pruned, way_of
from prunepass.errors import PruneError

__all__ = ["Outcome", "run"]

#: how far two values may lie apart, as a share of the largest value, by dtype; bfloat16 is checked for shape and NaN
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: torch.inf}
#: how near two scores must lie for a choice to be a matter of rounding, as a share of the largest score
NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
#: these compute attention in float32 by an explicit cast
SINGLE = ("xlm", "gptj", "codegen")


@dataclass
class Outcome:
    """What became of an episode's calls.

    Attributes:
        counts: calls by verdict: "same", "near tie" (rows left out for one), "wrong", "raw" (an error that is not
            ours), "refused", "not invariant" (the dense model depends on padding itself).
        notes: a line for each call that is wrong, raw or refused.
    """

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, verdict: str, episode: Episode, call: Call | None = None, detail: str = "") -> None:
        """Count a call, or all calls of an episode."""
        self.counts[verdict] += 1 if call is not None else len(episode.calls)
        if verdict in ("wrong", "raw", "refused"):
            self.notes.append(f"{verdict}: {episode}; {call}; {detail}")


def run(episode: Episode) -> Outcome:
    """Check an episode. Never raises for what the product does."""
    outcome = Outcome()
    exact = oracle.float64_softmax() if episode.dtype == torch.float64 else nullcontext()
    with exact:
        try:
            checks = _checks(episode)
        except PruneError as e:
            outcome.add("refused", episode, None, f"{type(e).__name__}: {e}")
            return outcome
        except Exception as e:  # any that is not ours is what is looked for
            outcome.add("raw", episode, None, _line(e))
            return outcome
        for call in episode.calls:
            try:
                outcome.add(*_verdict(episode, checks, call))
            except PruneError as e:
                outcome.add("refused", episode, call, f"{type(e).__name__}: {e}")
            except Exception as e:  # the same, of one call
                inner = getattr(e, "inner_exception", e)
                verdict = "refused" if isinstance(inner, PruneError) else "raw"
                outcome.add(verdict, episode, call, _line(inner))
    return outcome


def _line(e: BaseException) -> str:
    at = traceback.extract_tb(e.__traceback__)
    return f"{type(e).__name__}: {str(e).strip()[:300]} [{'; '.join(f'{f.filename}:{f.lineno}' for f in at[-3:])}]"


def _checks(episode: Episode) -> dict[str, Any]:
    source = captured(episode)
    masked = pruned(episode, source, "mask")
    found: dict[str, Any] = {"choices": Choices(masked)}
    if episode.way == "generate":
        return found | {"generated": generated(episode)}
    gathered = pruned(episode, source, "gather").graph_module
    if episode.way == "mask":
        return found | {"way": lambda x: harness.run(gathered, x), "reference": masked.graph_module}
    if episode.way == "alone":
        return found | {"gathered": gathered, "dense": model_of(episode)}
    return found | {"way": way_of(episode), "reference": gathered}


def _verdict(episode: Episode, checks: Mapping[str, Any], call: Call) -> tuple[str, Episode, Call, str]:
    x = call.inputs(episode.inputs)
    loose = episode.name in SINGLE and episode.dtype == torch.float64
    dtype = torch.float32 if loose else episode.dtype
    clear = checks["choices"].gaps(x) > NEAR[dtype]
    verdict = "same" if bool(clear.all()) else "near tie"
    if not clear.any():
        return verdict, episode, call, ""
    live = x["attention_mask"].bool() if "attention_mask" in x else torch.ones_like(x["input_ids"], dtype=torch.bool)
    live = live & clear[:, None]
    if episode.way == "alone":
        gap, invariant = _alone(checks, x, live, clear, TOLERANCE[dtype])
        verdict = verdict if invariant else "not invariant"
    elif episode.way == "generate":
        gap = _generate(checks, x, clear)
    else:
        gap = _gap(checks["way"](x), harness.run(checks["reference"], x), live, clear)
    if gap > TOLERANCE[dtype]:
        return "wrong", episode, call, f"{gap:.2e} apart"
    return verdict, episode, call, ""


def _gap(found: Any, expected: Any, live: Tensor, clear: Tensor) -> float:
    """Largest difference at live tokens of clear rows, as a share of the largest value there. Infinity for another
    shape or a NaN that the reference has not."""
    one, two = harness.tensors(found), harness.tensors(expected)
    one = one if set(one) == set(two) else dict(zip(two, one.values(), strict=True))
    worst = 0.0
    for name, value in two.items():
        other = one[name]
        if other.shape != value.shape:
            return torch.inf
        by_token = value.shape[:2] == live.shape
        rows = live if by_token else (clear & live[:, 0])
        a, b = other[rows].double(), value[rows].double()
        if not a.numel():
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return torch.inf
        gap = (a - b).abs().nan_to_num(nan=0.0)  # equal infinities
        worst = max(worst, float(gap.max() / b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0)))
    return worst


def _alone(
    checks: Mapping[str, Any], x: dict[str, Tensor], live: Tensor, clear: Tensor, tolerance: float
) -> tuple[float, bool]:
    """How far a row in its batch is from the row alone, and whether the dense model is the same for both."""
    worst = 0.0
    for model in (checks["dense"], checks["gathered"]):
        together = harness.tensors(harness.run(model, x))
        for b in [b for b in range(len(clear)) if clear[b]]:
            at = x["attention_mask"][b].bool()
            if at.sum() != (at.nonzero()[-1] - at.nonzero()[0] + 1):
                continue  # with holes, another row
            row = {name: value[b : b + 1, at] for name, value in x.items()}
            alone = harness.tensors(harness.run(model, row))
            for name, value in alone.items():
                both = together[name][b]
                mine = both[at] if value.shape[1:2] == (int(at.sum()),) and both.shape[0] == len(at) else both
                gap = (mine - value[0]).abs().max() / value.abs().max().clamp(min=1.0)
                worst = max(worst, float(gap.nan_to_num(nan=torch.inf)))
        if worst > tolerance:
            return (0.0, False) if model is checks["dense"] else (worst, True)
    return worst, True


def _generate(checks: Mapping[str, Any], x: dict[str, Tensor], clear: Tensor) -> float:
    """Infinity where a row alone gives other tokens than in its batch, padded on the left."""
    rows = [row[mask.bool()] for row, mask in zip(x["input_ids"], x["attention_mask"], strict=True)]
    together = checks["generated"](zoo.pad_rows(rows, side="left"))
    for b in [b for b in range(len(rows)) if clear[b]]:
        alone = checks["generated"](zoo.pad_rows([rows[b]]))
        if not torch.equal(alone[0], together[b]):
            return torch.inf
    return 0.0
