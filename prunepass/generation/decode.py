"""Cutting caches again while tokens are generated, by the scores that the plan's own predictors gave each token.

A prompt is pruned once, and every new token makes each cache longer. From time to time the caches of pruned layers are
cut to a share of the tokens seen (compare Dynamic Context Pruning, Anagnostidis et al. 2023, arXiv:2305.15805, and
DyRate, arXiv:2501.14204). What is kept of a token for that is one score a stage, of when it was computed. The scores
lie beside the keys and values that they are of, as an attribute of those tensors, so they end with them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from prunepass.errors import OptionError, PlanError
from prunepass.plan import Protect, protected_last, unknown_key
from prunepass.plan.values import as_fraction, shown

__all__ = ["Decode", "Scores", "as_keep", "carry_rows", "cut", "keep_scores", "scores_of", "taken"]

_NAME = "prunepass_scores"


@dataclass(frozen=True)
class Decode:
    """What the option ``decode`` says.

    Attributes:
        every: after how many new tokens caches are cut again; None keeps scores and cuts nothing, for
            `prunepass.compress_cache`.
        keep: share in (0, 1] of all tokens of the row seen so far, or how many tokens; None without ``every``.
    """

    every: int | None = None
    keep: Fraction | int | None = None

    @classmethod
    def parse(cls, value: Any) -> Decode:
        """From ``{"every": 64, "keep": 0.5}``.

        Raises:
            OptionError: another key, a number that cannot be, or one without the other.
        """
        if not isinstance(value, Mapping):
            raise OptionError(f"Option 'decode' must be a mapping such as {{'every': 64, 'keep': 0.5}}, not {value!r}.")
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                raise OptionError(unknown_key(key, known, "the option 'decode'"))
        if "every" not in value:
            raise OptionError(
                "Option 'decode' needs 'every', after how many new tokens caches are cut: {'every': 64, 'keep': 0.5}. "
                "With 'every': None scores are kept for prunepass.compress_cache(by='predictor')."
            )
        every, keep = value["every"], value.get("keep")
        if every is None:
            if keep is not None:
                raise OptionError("Option 'decode' says 'keep' and no 'every', so nothing would be cut. Give a number.")
            return cls()
        if isinstance(every, bool) or not isinstance(every, Integral) or int(every) < 1:
            raise OptionError(f"decode['every'] must be a whole number of at least 1, not {shown(every)}.")
        if keep is None:
            raise OptionError("Option 'decode' needs 'keep': a share such as 0.5, or a number of tokens such as 256.")
        return cls(int(every), as_keep(keep, "decode['keep']"))


def as_keep(value: Any, name: str) -> Fraction | int:
    """A number of tokens (a whole number), or a share (a float, a fraction, or text). Raises `OptionError`."""
    wanted = "must be a share in (0, 1], such as 0.5 or '1/2', or a whole number of tokens of at least 1"
    if not isinstance(value, bool) and isinstance(value, Integral):
        if int(value) < 1:
            raise OptionError(f"{name} {wanted}, not {shown(value)}.")
        return int(value)
    try:
        share = as_fraction(value, name)
    except PlanError:
        raise OptionError(f"{name} {wanted}, not {shown(value)}.") from None
    if not 0 < share <= 1:
        raise OptionError(f"{name} {wanted}, not {shown(value)}.")
    return share


@dataclass(frozen=True)
class Scores:
    """What is known of the K slots of the caches between one stage and the next.

    Attributes:
        scores: [B, K] floating.
        rank: [B, K] int64, the token's place among the row's live tokens.
        filled: [B, K] bool, False at slots that hold no token.
        stays: [B, K] bool, the tokens that the plan protects in the prompt, and those of protected ids.
        seen: [B, 1] int64, live tokens of the row so far.
        protect: what the plan protects.
        slots: width of the rows so far, padding included.
        since: tokens since the last cut.
    """

    scores: Tensor
    rank: Tensor
    filled: Tensor
    stays: Tensor
    seen: Tensor
    protect: Protect
    slots: int
    since: int = 0

    def __len__(self) -> int:
        return self.scores.shape[1]

    def rows(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """Of other rows: ``change`` takes and gives values that begin with the batch."""
        return self._each(change)

    def slots_at(self, index: Tensor, filled: Tensor) -> Scores:
        """At the slots ``index`` [B, K'], of which those are ``filled``."""
        moved: dict[str, Any] = {n: getattr(self, n).gather(1, index) for n in ("scores", "rank", "stays")}
        return replace(self, **moved, filled=filled)

    def followed_by(self, scores: Tensor, live: Tensor, stays: Tensor) -> Scores:
        """With new tokens behind: [B, Q] scores, which of them are live, and which stay."""
        counted = live.to(torch.int64)
        new = {"scores": scores, "rank": self.seen + counted.cumsum(1) - 1, "filled": live, "stays": stays}
        joined: dict[str, Any] = {
            name: torch.cat([getattr(self, name), x.to(getattr(self, name).dtype)], 1) for name, x in new.items()
        }
        return replace(
            self,
            **joined,
            seen=self.seen + counted.sum(1, keepdim=True),
            slots=self.slots + live.shape[1],
            since=self.since + live.shape[1],
        )

    def joined(self, turn: Scores) -> Scores:
        """With the tokens behind that a later turn kept, whose places are counted in the turn."""
        moved = replace(turn, rank=turn.rank + self.seen)
        names = ("scores", "rank", "filled", "stays")
        both: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(moved, name)], 1) for name in names}
        slots, since = self.slots + turn.slots, self.since + turn.slots
        return replace(self, **both, seen=self.seen + turn.seen, slots=slots, since=since)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        changed: dict[str, Any] = {name: change(x) for name, x in tensors.items()}
        return replace(self, **changed)


def scores_of(states: Tensor | None) -> Scores | None:
    """The scores that lie beside keys or values [B, H, K, D]; None where there are none of this length."""
    found = getattr(states, _NAME, None)
    fits = isinstance(found, Scores) and states is not None and found.scores.shape == (states.shape[0], states.shape[2])
    return found if fits else None


def keep_scores(states: Tensor, scores: Scores) -> None:
    """Put scores beside keys or values."""
    setattr(states, _NAME, scores)


def cut(scores: Scores, keep: Fraction | int) -> tuple[Scores, Tensor] | None:
    """Choose again which tokens stay.

    Row b keeps ``max(k_b, protected tokens)`` of those that its caches hold: k_b is ``ceil(keep * n_b)`` of the n_b
    live tokens seen, or the number ``keep``. Protected are those that the plan protects in the prompt, and at the end
    of the row as it is now. The others stay by score; ties go to the earlier token.

    Returns:
        Scores of what stays, and [B, K'] int64, the slots it is in now: ascending, the tokens of a row at its end, and
        any slots before them where it has fewer than others. None where every token stays.
    """
    if isinstance(keep, int):
        wanted = torch.full_like(scores.seen, keep)
    else:
        wanted = (scores.seen * keep.numerator + keep.denominator - 1) // keep.denominator
    last = protected_last(scores.seen, scores.protect, maximum=_maximum)
    safe = scores.filled & (scores.stays | (scores.rank >= scores.seen - last))
    free = scores.filled & ~safe
    room = (wanted - safe.sum(1, keepdim=True)).clamp(min=0)
    number = torch.where(scores.scores.isnan(), torch.full_like(scores.scores, -torch.inf), scores.scores)
    # two stable sorts: free tokens first, the best of them in front, earlier ones before later ones of equal score
    by_score = torch.sort(number, dim=1, descending=True, stable=True).indices
    among = torch.sort((~free).gather(1, by_score).to(torch.int8), dim=1, stable=True).indices
    order = by_score.gather(1, among)
    place = torch.zeros_like(order).scatter(1, order, torch.arange(len(scores), device=order.device).expand_as(order))
    kept = safe | (free & (place < room))
    if bool((kept == scores.filled).all()):
        return None
    counts = kept.sum(1, keepdim=True)
    width = int(counts.max())
    index = torch.sort(kept.to(torch.int8), dim=1, stable=True).indices[:, -width:]
    filled = torch.arange(width, device=index.device)[None, :] >= width - counts
    return scores.slots_at(index, filled), index


def _maximum(a: Any, b: Any) -> Any:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)


def taken(states: Tensor, index: Tensor, filled: Tensor) -> Tensor:
    """Keys or values [B, H, K, D] at the slots ``index`` [B, K']; zeros where a slot is not ``filled``."""
    places = index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    chosen = states.gather(2, places)
    return chosen if bool(filled.all()) else chosen * filled[:, None, :, None].to(chosen.dtype)


def carry_rows() -> None:
    """Have the caches of transformers take scores along when they reorder, repeat or choose rows (beam search)."""
    if "transformers.cache_utils" not in sys.modules:
        return
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer

    changes: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "reorder_cache": lambda rows, x: x.index_select(0, rows.to(x.device)),
        "batch_repeat_interleave": lambda repeats, x: x.repeat_interleave(repeats, dim=0),
        "batch_select_indices": lambda rows, x: x[rows, ...],
    }
    for name, change in changes.items():
        owner = next(c for c in (DynamicLayer, CacheLayerMixin) if name in vars(c))
        given = getattr(owner, name)
        if not getattr(given, "prunepass", False):
            setattr(owner, name, _carrying(given, change))


def _carrying(given: Callable[..., Any], change: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    def carrying(self: Any, rows: Any) -> Any:
        before = [(name, scores_of(getattr(self, name, None))) for name in ("keys", "values")]
        result = given(self, rows)
        for name, scores in before:
            if scores is not None:
                keep_scores(getattr(self, name), scores.rows(lambda x: change(rows, x)))
        return result

    carrying.prunepass = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return carrying
