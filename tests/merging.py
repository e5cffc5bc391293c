"""The hook oracle for merging: the unmodified model, whose states are averaged in plain Python before its layers.

Nothing here imports prunepass. Merged tokens are hidden as keys as in `hooks`; behind the last layer each token gets
the state of the kept token that it went to, over however many stages. Attention adds the logarithm of how many tokens
a key stands for to its scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hooks
import oracle


def run_merged(
    model: nn.Module, layers: list[nn.Module], plan: Any, inputs: dict[str, Tensor], causal: bool
) -> oracle.Masked:
    """As `hooks.run_hooked`, for plans with stages that merge."""
    run = _Merging(plan, inputs, None)
    run.causal, run.count = causal, len(layers)
    with run.attached(layers), run.mode, torch.no_grad():
        output = model(**inputs)
    assert len(run.history) == len(plan.stages)
    return oracle.Masked(output, run.history)


class _Merging(hooks._Hooked):
    causal: bool
    count: int
    free: Tensor

    def __init__(self, plan: Any, inputs: dict[str, Tensor], prompt: int | None) -> None:
        super().__init__(plan, inputs, prompt)
        batch, length = self.ids.shape
        self.size: list[list[float]] = [[1.0] * length for _ in range(batch)]
        self.went_to = [list(range(length)) for _ in range(batch)]

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, reached = self.alive, len(self.history)
        super()._before(layer, args, kwargs)
        if len(self.history) == reached or self.plan.stages[reached].leave != "merge":
            return None
        free = self.alive.clone()
        for b, row in enumerate(self.live):
            real = [t for t in range(len(row)) if row[t]]
            at_end = oracle.protected_at_end(len(real), self.plan.protect)
            named = [t for t in real if int(self.ids[b, t]) in self.plan.protect.token_ids]
            free[b, [*real[: self.plan.protect.first], *real[len(real) - at_end :], *named]] = False
        self.free = free
        old = self.entering
        new = torch.stack([self._row(b, old[b], before[b], self.alive[b]) for b in range(len(old))])
        self.entering = new
        self.mode.bias = torch.tensor(self.size, dtype=torch.float64).log()
        return tuple(new if x is old else x for x in args), {k: new if x is old else x for k, x in kwargs.items()}

    def _row(self, b: int, states: Tensor, before: Tensor, after: Tensor) -> Tensor:
        out = states.clone()
        stay = [t for t in range(len(after)) if after[t]]
        met: dict[int, list[int]] = {k: [k] for k in stay}
        for t in range(len(after)):
            if not before[t] or after[t]:
                continue
            hosts = [k for k in stay if bool(self.free[b, k]) and (k > t or not self.causal)]
            if hosts:
                near = [float(torch.cosine_similarity(states[t], states[k], dim=0)) for k in hosts]
                host = hosts[near.index(max(near))]
                met[host].append(t)
                self.went_to[b][t] = host
        for k, members in met.items():
            total = sum(self.size[b][t] for t in members)
            out[k] = sum(self.size[b][t] * states[t] for t in members) / total
            self.size[b][k] = total
        return out

    def _rested(self, hidden: Tensor) -> Tensor:
        rested = super()._rested(hidden)
        if self.calls < self.count:
            return rested
        out = rested.clone()
        for b, went_to in enumerate(self.went_to):
            for t in range(len(went_to)):
                host = t
                while went_to[host] != host:
                    host = went_to[host]
                out[b, t] = rested[b, host]
        return out
