"""Which models merge into later tokens only, told by the masks they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunepass import PrunePlan, Stage
from prunepass.graph.head import Reading
from prunepass.passes.default_plan import head_warning
from prunepass.passes.later import _hides_later

SLOTS = torch.arange(8)
BACKWARD = SLOTS[None, :] <= SLOTS[:, None]
MASKS = {
    "causal": (BACKWARD, True),
    "causal in a window": (BACKWARD & (SLOTS[None, :] > SLOTS[:, None] - 3), True),
    "a prefix seen whole": (BACKWARD | (SLOTS < 3)[None, :], True),
    "all": (torch.ones(8, 8, dtype=torch.bool), False),
    "a window both ways": ((SLOTS[None, :] - SLOTS[:, None]).abs() <= 2, False),
}


@pytest.mark.parametrize("label", MASKS)
def test_masks_in_every_form(label: str) -> None:
    visible, expected = MASKS[label]
    forms: list[Tensor] = [visible, ~visible, torch.zeros(8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)]
    for form in forms:
        assert _hides_later(form.expand(2, 1, 8, 8)) is expected


@pytest.mark.parametrize("reading", [Reading.STATES, Reading.POOL, Reading.EACH])
def test_warnings_say_what_merged_tokens_carry(reading: Reading) -> None:
    drop, merge = Stage(1, 0.5), Stage(2, 0.25, leave="merge")
    texts = {p: head_warning(PrunePlan(p), frozenset({reading})) for p in ((drop,), (merge,), (drop, merge))}
    merged = texts[(merge,)]
    assert merged is not None
    assert "was merged into" in merged
    assert "left" not in merged
    assert len(set(texts.values())) == (3 if reading is Reading.EACH else 2)
    assert head_warning(PrunePlan((merge,), restore="mean"), frozenset({Reading.STATES})) is None
