"""The token side of a report: counts as formulas, what is protected, how far each token of a sentence came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from prunepass.passes.live import live_tokens as find_live
from prunepass.passes.segments import named_tokens
from prunepass.plan import Protect, PrunePlan, kept_count, protected_last, share_of

__all__ = ["TokenCounts", "count_formula", "last_blocks", "live_tokens", "protection_warnings", "tokens_at"]


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens a row has where a share of them is left: as a formula, and in the example.

    Attributes:
        length: S, of the example.
        live, leaving: by row of the example, how many tokens there are, and how many of them may leave (I), where only
            some may; empty where all may.
    """

    length: int
    protect: Protect
    live: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()

    @classmethod
    def of_prompt(cls, protect: Protect, ids: Tensor, live: Tensor) -> TokenCounts:
        """Of a prompt with images, whose tokens alone may leave where the plan says so.

        Args:
            ids: [B, S] int64.
            live: [B, S] bool.
        """
        found = find_live(ids, live, ids, protect)
        if found.leaving is None or found.count is None:
            return cls(ids.shape[1], protect)
        return cls(ids.shape[1], protect, tuple(found.count[:, 0].tolist()), tuple(found.leaving[:, 0].tolist()))

    def formula(self, keep: Fraction) -> str:
        """As `count_formula`; ``S - I + ceil(I/2)`` where I tokens of a row may leave."""
        if not self.leaving or keep == 1:
            return count_formula(keep, self.protect)
        return f"S - I + {_ceil_text(keep, 'I')}"

    def at(self, keep: Fraction) -> int:
        """The formula's value in the example, in the row where it is the greatest."""
        if not self.leaving or keep == 1:
            return int(kept_count(self.length, keep, self.protect))
        return max(n - free + int(share_of(free, keep)) for n, free in zip(self.live, self.leaving, strict=True))


def count_formula(keep: Fraction, protect: Protect) -> str:
    """`plan.kept_count` as text, a formula in the length S: ``ceil(7*S/10)``, ``min(S, max(4, ceil(S/2)))``."""
    share = _ceil_text(keep)
    if keep == 1 or (protect.first + protect.last <= 1 and not protect.last_share):
        return share
    return f"min(S, max({_floor_text(protect)}, {share}))"


def _floor_text(protect: Protect) -> str:
    if not protect.last_share:
        return str(protect.first + protect.last)
    last = _ceil_text(protect.last_share)
    if protect.last:
        last = f"max({protect.last}, {last})"
    return f"{protect.first} + {last}" if protect.first else last


def _ceil_text(share: Fraction, of: str = "S") -> str:
    if share == 1:
        return of
    product = of if share.numerator == 1 else f"{share.numerator}*{of}"
    return f"ceil({product}/{share.denominator})"


def tokens_at(plan: PrunePlan, block: int, *, after_attention: bool) -> Fraction:
    """Share of the original tokens that is alive in a block's attention, or after it."""
    share = Fraction(1)
    for stage in plan.stages:
        if (stage.layer, stage.after_attention) <= (block, after_attention):
            share = stage.keep
    return share


def protection_warnings(
    plan: PrunePlan, token_ids: Tensor | None, live: Tensor, types: Tensor | None = None
) -> list[str]:
    """A warning for each stage whose budget cannot hold all protected tokens of some row.

    Args:
        token_ids: [B, S] int64, or None where the model gets embeddings.
        live: [B, S] bool, the tokens that are not padding.
        types: [B, S] token_type_ids, where the model takes them.
    """
    named = named_tokens(plan.protect, token_ids, types, live)
    if named is None:
        return []
    protected = [_protected(plan.protect, row[alive]) for row, alive in zip(named, live, strict=True)]
    warnings = []
    for stage in plan.stages:
        over = [
            (row, int(mask.sum()), budget)
            for row, mask in enumerate(protected)
            if int(mask.sum()) > (budget := int(kept_count(len(mask), stage.keep, plan.protect)))
        ]
        if over:
            row, wanted, budget = max(over, key=lambda found: found[1] - found[2])
            warnings.append(
                f"{stage.place}: {wanted} tokens of row {row} of the example are protected, but keep={stage.keep} "
                f"leaves room for {budget} ({len(over)} of {len(protected)} rows are affected). Those protected by "
                "position and the earlier ones by id or segment are kept; protect fewer, or raise keep."
            )
    return warnings


def _protected(protect: Protect, named: Tensor) -> Tensor:
    """[n] bool over one row's live tokens: ``named`` by id or segment, or protected by position."""
    position = torch.arange(len(named), device=named.device)
    last = int(protected_last(len(named), protect))
    return named | (position < protect.first) | (position >= len(named) - last)


def last_blocks(plan: PrunePlan, kept: Sequence[Tensor], num_blocks: int, shape: Sequence[int]) -> Tensor:
    """The last block each token took part in: [B, S] int64, -1 where it met none.

    Args:
        kept: one [B, S] bool for each stage that prunes (keep below 1): the tokens still alive behind it.
        shape: (B, S).
    """
    last = torch.full(tuple(shape), num_blocks - 1, dtype=torch.int64)
    # From the last stage to the first: the first stage that drops a token decides.
    stages = [stage for stage in plan.stages if stage.keep < 1]
    for stage, alive in reversed(list(zip(stages, kept, strict=True))):
        last[~alive.cpu()] = stage.layer if stage.after_attention else stage.layer - 1
    return last


def live_tokens(inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
    """[B, S] bool: the attention mask's live tokens, all of them where there is none."""
    mask = inputs.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones(tuple(shape), dtype=torch.bool)
