"""A dozen of the causal types that `tests/sweep` goes through: pruned right against the hook oracle, or refused."""

from __future__ import annotations

from typing import Any

import pytest
from sweep.checks import PROTECT, check, inputs_of
from sweep.models import build
from sweep.table import table

import harness
import hooks
import oracle
import prunepass
from prunepass import PrunePlan, Stage

#: type, what becomes of it, a part of the note: what is special in it
TYPES = {
    "deepseek_v3": ("right", ""),  # latent attention, keys written into an empty tensor
    "phimoe": ("right", ""),  # a router of its own
    "granitemoe": ("right", ""),  # experts
    "ernie4_5_moe": ("right", ""),  # experts beside dense layers
    "llama4_text": ("right", ""),  # complex rotary positions, chunked attention
    "falcon": ("right", ""),  # heads of one key
    "cohere2": ("right", ""),  # windows
    "bart": ("right", ""),  # a decoder alone
    "lfm2": ("right", ""),  # convolutions in layers between
    "bailing_hybrid": ("right", "from layer 3"),  # linear attention in layers between
    "bamba": ("refused", "a convolution over the sequence"),
    "deepseek_v4": ("refused", "several states for each token"),
}
DAILY = ("phimoe", "granitemoe", "llama4_text", "falcon", "bart", "lfm2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in TYPES])
def test_a_type_is_pruned_right_or_refused(name: str) -> None:
    found = check(name, generate=False)
    outcome, note = TYPES[name]
    assert (found.prune, note in found.prune_note) == (outcome, True), found.prune_note


def test_generation_is_checked_at_each_step() -> None:
    found = check("llama")
    assert (found.prune, found.generate) == ("right", "right"), (found.prune_note, found.generate_note)


def test_the_table_has_a_line_for_each_type_that_runs() -> None:
    rows = {
        "one": {
            "prune": "right",
            "prune_note": "0.0e+00",
            "generate": "refused",
            "generate_note": "/a/site-packages/a | b",
        },
        "two": {"prune": "unbuilt", "prune_note": "no", "generate": "unbuilt"},
        "three": {"prune": "right", "prune_note": "from layer 3: why", "generate": "right", "generate_note": "1e-15"},
    }
    lines = table(rows).splitlines()
    assert lines[2] == "| one | right | refused: a \\| b |"
    assert lines[3] == "| three | right, from layer 3 | right |"
    assert lines[-1].startswith("3 types; 1 of them")


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_of_layers_that_run_in_cycles_the_last_ones_are_pruned(side: str) -> None:
    """HRM: four layers run twice, each time after four others that run three times. Those of the last cycle are the
    last four of 17 blocks; the oracle counts calls of the four from the first on."""
    with oracle.float64_softmax():
        model: Any = build("hrm_text")
        layers = list(dict(model.named_modules())["model.H_module.layers"])
        plan, of_calls = (
            PrunePlan([Stage(1 + n, 0.7), Stage(2 + n, 0.5), Stage(3 + n, 0.3)], "norm", PROTECT) for n in (13, 4)
        )
        pruned = prunepass.prune(model, plan, inputs_of(model, [11, 7], "right"))
        x = inputs_of(model, [13, 9, 4], side)
        live = x["attention_mask"].bool()
        found, expected = harness.run(pruned, x), hooks.run_hooked(model, layers, of_calls, x).output
        assert harness.difference(found, expected, live) < 1e-9
        assert harness.difference(found, harness.run(model, x), live) > 1e-3
