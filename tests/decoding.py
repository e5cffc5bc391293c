"""The reference for caches that are cut while tokens are generated: the whole unpruned model, run anew for each token,
with the cut tokens hidden as keys of the layers after the stage. Nothing here imports prunepass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import oracle


class Greedy:
    """Greedy search, call by call.

    Attributes:
        cache: that the last call returned.
    """

    cache: Any

    def call(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """[B, 1] choices after rows whose last ``new`` tokens come now."""
        raise NotImplementedError

    def run(self, ids: Tensor, mask: Tensor, steps: int, new: int | None = None) -> tuple[Tensor, Tensor]:
        """Greedy search; rows and mask with the tokens that it gave."""
        new = ids.shape[1] if new is None else new
        for _ in range(steps):
            token = self.call(ids, mask, new)
            ids, mask, new = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1), 1
        return ids, mask

    def lengths(self) -> list[int]:
        return [layer.keys.shape[2] for layer in self.cache.layers]


class Reference:
    """A row of calls: the first prunes its tokens, later ones keep theirs, and every so many of those cut.

    Scores are norms. In each layer a token sees those keys that were there when it was computed, so that what came
    before stays as it was.

    Args:
        layers: the blocks in order.
        whole: blocks whose caches are never cut again (those of a window, and the one that positions are counted by).
        window: by block, how many positions it sees; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        plan: Any,
        every: int | None = None,
        keep: Any = None,
        whole: tuple[int, ...] = (),
        window: Callable[[int], int | None] = lambda layer: None,
    ) -> None:
        self.model, self.layers, self.plan = model, layers, plan
        self.every, self.keep, self.whole, self.window = every, keep, whole, window
        self.of = [sum(s.layer <= i for s in plan.stages) for i in range(len(layers))]
        self.seen: list[Tensor] = []  # by block, [B, n, n]: which keys each token saw
        self.alive: list[Tensor] = []  # by block, [B, n]: which keys are there now
        self.stays: Tensor | None = None
        self.scores: list[Tensor] = []  # by stage, [B, n]
        self.since = 0

    def call(self, ids: Tensor, mask: Tensor, new: int, *, prune: bool = False) -> Tensor:
        """[B, n, V] logits of rows whose last ``new`` tokens come now.

        Args:
            prune: whether a later call prunes the tokens that it brings, as the first does.
        """
        first = not self.alive
        if first or prune:
            self._prune(ids, mask, new)
        else:
            self._append(mask, new)
        logits = self._run(ids, mask)
        if not first:
            self.since += new
        if self.every is not None and self.since >= self.every:
            self.since = 0
            self._cut(mask)
        return logits

    def cut(self, mask: Tensor, keep: Any) -> None:
        """Cut now."""
        self.keep = keep
        self._cut(mask)

    def lengths(self) -> list[int]:
        """How many slots each cache needs: as many as the row with the most tokens."""
        return [int(a.sum(1).max()) for a in self.alive]

    def _append(self, mask: Tensor, new: int) -> None:
        before = mask.shape[1] - new
        own = mask[:, -new:].bool()
        self.alive = [torch.cat([a, own], 1) for a in self.alive or [own[:, :0] for _ in self.layers]]
        for i, alive in enumerate(self.alive):
            seen = torch.zeros(len(mask), before + new, before + new, dtype=torch.bool)
            if before:
                seen[:, :before, :before] = self.seen[i]
            seen[:, before:] = alive[:, None, :] & torch.ones(before + new, before + new).tril().bool()[before:]
            self.seen[i : i + 1] = [seen]

    def _prune(self, ids: Tensor, mask: Tensor, new: int) -> None:
        """Stage by stage: with the tokens hidden that the stages before it pruned, the states at it are known."""
        before = mask.shape[1] - new
        self._append(mask, new)
        live, alive = mask[:, before:].bool(), mask[:, before:].bool()
        places = live.long().cumsum(1) - 1
        last = torch.tensor([[oracle.protected_at_end(int(n), self.plan.protect)] for n in live.sum(1)])
        stays = live & ((places < self.plan.protect.first) | (places >= live.sum(1, keepdim=True) - last))
        old = stays[:, :0] if self.stays is None else self.stays
        self.stays = torch.cat([torch.nn.functional.pad(old, (0, before - old.shape[1])), stays], 1)
        for number, stage in enumerate(self.plan.stages):
            self._run(ids, mask)
            given = (self.scores[number][:, before:], alive, live, ids[:, before:])
            alive = oracle.select_rows(*given, stage.keep, self.plan.protect)
            for i, level in enumerate(self.of):
                if level > number:
                    self.alive[i] = torch.cat([self.alive[i][:, :before], alive], 1)
                    self.seen[i][:, before:, before:] &= alive[:, None, :]

    def _cut(self, mask: Tensor) -> None:
        counts = mask.sum(1)
        places = mask.cumsum(1) - 1
        for i, level in enumerate(self.of):
            if not level or i in self.whole:
                continue
            for row in range(len(mask)):
                n = int(counts[row])
                count = self.keep if isinstance(self.keep, int) else math.ceil(Fraction(str(self.keep)) * n)
                end = n - oracle.protected_at_end(n, self.plan.protect)
                there = [t for t in range(mask.shape[1]) if self.alive[i][row, t]]
                safe = [t for t in there if self._stays(row, t) or int(places[row, t]) >= end]
                others = [t for t in there if t not in safe]
                others.sort(key=lambda t: (-float(self.scores[level - 1][row, t]), t))  # called here
                kept = safe + others[: max(0, count - len(safe))]
                self.alive[i][row] = torch.tensor([t in kept for t in range(mask.shape[1])])

    def _stays(self, row: int, token: int) -> bool:
        assert self.stays is not None
        return token < self.stays.shape[1] and bool(self.stays[row, token])

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits under the masks as they are; notes the scores of tokens that have none, and of those pruned now."""
        self.scores = [torch.zeros(ids.shape, dtype=torch.float64) for _ in self.plan.stages]
        length = ids.shape[1]
        gap = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        handles = []
        for i, layer in enumerate(self.layers):
            seen = self.seen[i].clone()
            if (window := self.window(i)) is not None:
                seen &= gap < window
            seen |= torch.eye(length, dtype=torch.bool)  # no row of a softmax is empty; nothing reads such rows

            def give(module: nn.Module, args: Any, kwargs: Any, i: int = i, seen: Tensor = seen) -> Any:
                given = inspect.signature(module.forward).bind(*args, **kwargs)
                extra = given.arguments.pop("kwargs", {})
                hidden = next(iter(given.arguments.values()))
                for number, stage in enumerate(self.plan.stages):
                    if stage.layer == i:
                        self.scores[number] = hidden.norm(dim=-1)
                bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
                return (), {**given.arguments, **extra, "attention_mask": bias[:, None]}

            handles.append(layer.register_forward_pre_hook(give, with_kwargs=True))
        try:
            with torch.no_grad(), oracle.float64_softmax():
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                logits: Tensor = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits
