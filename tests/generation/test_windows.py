"""`generate()` with models whose layers attend in a window, and with attention "eager": the prompt is pruned, and each
later token sees what is kept of it and in the window, by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_generation import PLAN, compiled, generated, prompts
from torch import Tensor

import hooks
import oracle
import zoo
from prunepass import PrunePlan
from prunepass.dynamo.backend import compilations
from windowed import WINDOW, WINDOWED, windowed

#: so many that the window has moved on from the prompt
STEPS = WINDOW + 3

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, the longest], padded on the left."""
    width = max(lengths)
    ids = prompts(len(lengths), width, seed=3)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return torch.where(mask.bool(), ids, zoo.PAD), mask


class Followed:
    """A model compiled and pruned, and from call to call the whole unpruned one, which hides what was pruned.

    Args:
        later: "graph" runs later calls as torch.compile does, "module" runs the model's own code.
    """

    def __init__(self, name: str, plan: PrunePlan = PLAN, later: str = "module", **options: Any) -> None:
        self.fast = compiled(windowed(name, **options), plan)
        self.exact = windowed(name, **{**options, "use_cache": False})
        self.plan, self.later = plan, later
        self.cache: Any = None
        self.worst = 0.0

    def call(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """[B, 1] greedy choices after the last ``new`` tokens of rows so far."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = self.cache is None
        call = self.fast if first or self.later == "graph" else self.fast.forward
        given = {"attention_mask": mask, "position_ids": positions}
        with oracle.float64_softmax(), torch.no_grad():
            found = call(
                input_ids=ids[:, -new:],
                attention_mask=mask,
                position_ids=positions[:, -new:],
                past_key_values=self.cache,
            )
            if first:
                self.prompt = ids.shape[1]
            self.cache = found.past_key_values
            layers = hooks.layers_of(self.exact, self.exact.config.num_hidden_layers)
            exact = hooks.run_hooked(self.exact, layers, self.plan, {"input_ids": ids, **given}, self.prompt)
        logits = exact.output.logits[:, -new:]
        live = mask[:, -new:].bool()
        if first:
            live = live & exact.alive[-1][:, -new:] & (torch.arange(new) == new - 1)
        self.worst = max(self.worst, float((found.logits[:, -live.shape[1] :] - logits)[live].abs().max()))
        return logits[:, -1:].argmax(-1)

    def run(self, ids: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy search; rows and mask with the tokens that it gave."""
        new = ids.shape[1] if self.cache is None else 1
        for _ in range(steps):
            token = self.call(ids, mask, new)
            ids, mask, new = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1), 1
        return ids, mask


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("lengths", [[23, 16, 4], [5]], ids=str)
def test_each_step_sees_what_is_kept_and_in_the_window(name: str, lengths: list[int]) -> None:
    """Prompts longer than the window and shorter; alone, and padded beside longer ones."""
    run = Followed(name)
    run.run(*rows(lengths), STEPS)
    assert run.worst < 1e-10
