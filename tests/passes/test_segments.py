"""A part of a pair is kept: which tokens that are, on every target, alone and in a batch, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes import CONFIG, OFFLINE, assert_same, bert, text
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PlanError
from prunepass.passes.segments import named_tokens
from prunepass.pipeline import kept_tokens
from prunepass.report.tokens import protection_warnings

SEP = 3


def pair(first: int, second: int, width: int, seed: int = 0, side: str = "right") -> dict[str, Tensor]:
    """One row: a start token, the first part, a separator, the second part, a separator; padded on one side."""
    ids = text(1, first + second + 3, seed)["input_ids"]
    ids[0, first + 1] = ids[0, -1] = SEP
    types = torch.zeros_like(ids)
    types[0, first + 2 :] = 1
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    lack = width - ids.shape[1]
    filled = {name: 1 if name == "input_ids" else 0 for name in row}
    pads = (0, lack) if side == "right" else (lack, 0)
    return {name: torch.nn.functional.pad(v, pads, value=filled[name]) for name, v in row.items()}


def batch(*rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


PAIRS = batch(pair(5, 20, 30, 1), pair(3, 9, 30, 2), pair(9, 18, 30, 3))
PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.4)], "norm", Protect(segment="first"))


def roberta() -> RobertaModel:
    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=40,
        num_hidden_layers=3,
        vocab_size=97,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    return RobertaModel(config).eval().double()


# -- which tokens ------------------------------------------------------------------------------------------------------


def in_segment(which: str, ids: Any, types: Any, alive: Any) -> Any:
    """The definition, token by token."""
    out = np.zeros(ids.shape, dtype=bool)
    for b in range(ids.shape[0]):
        live = [s for s in range(ids.shape[1]) if alive[b, s]]
        if types is not None:
            part = {s: int(types[b, s] != 0) for s in live}
            paired = any(part.values())
        else:
            ends = [s for s in live if ids[b, s] == SEP]
            part = {s: int(bool(ends) and s > ends[0]) for s in live}
            paired = any(part[s] and ids[b, s] != SEP for s in live)
        for s in live:
            out[b, s] = paired and part[s] == ("first", "second").index(which)
    return out


@settings(max_examples=200, deadline=None)
@given(data=st.data(), which=st.sampled_from(["first", "second"]), typed=st.booleans(), masked=st.booleans())
def test_the_tokens_of_a_part(data: st.DataObject, which: Any, typed: bool, masked: bool) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))

    def table(low: int, high: int) -> Any:
        cells = st.lists(st.integers(low, high), min_size=rows * length, max_size=rows * length)
        return np.array(data.draw(cells)).reshape(rows, length)

    ids, types = table(SEP, SEP + 2), table(0, 1) if typed else None
    alive = table(0, 1) if masked else np.ones_like(ids)
    found = named_tokens(
        Protect(segment=which, token_ids=() if typed else (SEP,)),
        torch.from_numpy(ids),
        None if types is None else torch.from_numpy(types),
        torch.from_numpy(alive) != 0 if masked else None,
    )
    assert found is not None
    wanted = in_segment(which, ids, types, alive)
    if not typed:  # separators are protected themselves
        wanted = wanted | (ids == SEP)
    live = alive != 0
    np.testing.assert_array_equal(found.numpy() & live, wanted & live)


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", ["first", "second"])
def test_the_part_is_kept_before_any_other_token(segment: Any) -> None:
    plan = PrunePlan([Stage(1, 0.8), Stage(2, 0.75)], "norm", Protect(segment=segment))
    rows = batch(pair(9, 9, 30, 1), pair(4, 5, 30, 2))
    part = (rows["token_type_ids"] == int(segment == "second")) & (rows["attention_mask"] != 0)
    for kept in kept_tokens(bert(), plan, rows):
        assert bool(kept[part].all())
        assert int(kept.sum()) < int((rows["attention_mask"] != 0).sum())


def test_of_a_part_longer_than_the_budget_the_earlier_tokens_are_kept() -> None:
    row = pair(20, 4, 27)
    plan = PrunePlan([Stage(1, "1/3")], "norm", Protect(segment="first"))
    (kept,) = kept_tokens(bert(), plan, row)
    assert kept[0].nonzero().flatten().tolist() == list(range(9))
    live = row["attention_mask"] != 0
    (warning,) = protection_warnings(plan, row["input_ids"], live, row["token_type_ids"])
    assert "22 tokens of row 0 of the example are protected, but keep=1/3 leaves room for 9" in warning


def test_a_row_of_one_part_is_pruned_as_without_the_segment() -> None:
    rows = text(3, 20)
    rows["token_type_ids"] = torch.zeros_like(rows["input_ids"])
    bare = PrunePlan(PLAN.stages, PLAN.scorer)
    for one, two in zip(kept_tokens(bert(), PLAN, rows), kept_tokens(bert(), bare, rows), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("side", ["right", "left"])
def test_gathering_equals_masking_and_padding_changes_nothing(side: str) -> None:
    model = bert().double()
    rows = [pair(5, 20, 30, 1, side), pair(3, 9, 30, 2, side)]
    alone = pair(3, 9, 15, 2)
    for row in (*rows, alone):  # BERT counts positions from the slots
        row["position_ids"] = (row["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = batch(*rows)
    pruned = prunepass.prune(model, PLAN, together)
    masked = prunepass.prune(model, PLAN, together, mode="mask")
    with torch.no_grad():
        got, wanted, single = (
            run(**x).last_hidden_state for run, x in ((pruned, together), (masked, together), (pruned, alone))
        )
    live = together["attention_mask"] != 0
    torch.testing.assert_close(got[live], wanted[live], atol=1e-10, rtol=0)
    torch.testing.assert_close(got[1][live[1]], single[0], atol=1e-10, rtol=0)


def test_without_types_the_first_separator_ends_the_first_part() -> None:
    rows = {name: PAIRS[name] for name in ("input_ids", "attention_mask")}
    plan = PrunePlan([Stage(1, 0.7)], "norm", Protect(segment="first", token_ids=(SEP,)))
    model = roberta()
    (kept,) = kept_tokens(model, plan, rows)
    part = (PAIRS["token_type_ids"] == 0) & (rows["attention_mask"] != 0)
    assert bool(kept[part].all())
    with torch.no_grad():
        gathered = prunepass.prune(model, plan, rows)(**rows).pooler_output
        masked = prunepass.prune(model, plan, rows, mode="mask")(**rows).pooler_output
    torch.testing.assert_close(gathered, masked, atol=1e-10, rtol=0)


@pytest.mark.parametrize("target", ["inductor", *OFFLINE])
def test_targets(target: str) -> None:
    if target in OFFLINE:
        pytest.importorskip(target)
    model = bert()
    run = torch.compile(
        model, backend="tokprune", options={"plan": PLAN, "target": target, "config": CONFIG.get(target)}
    )
    with torch.no_grad():
        wanted = prunepass.prune(model, PLAN, PAIRS)(**PAIRS)
        assert_same({"pooled": run(**PAIRS).pooler_output}, {"pooled": wanted.pooler_output})


# -- plans -------------------------------------------------------------------------------------------------------------


def test_it_stands_in_files_only_where_it_is_asked_for() -> None:
    assert PrunePlan.from_json(PLAN.to_json()) == PLAN
    assert "segment" not in PrunePlan(PLAN.stages).to_json()
    assert repr(PLAN.protect) == "Protect(segment='first')"


@pytest.mark.parametrize("segment", ["third", 1, True, ["first"]])
def test_other_parts_are_refused(segment: Any) -> None:
    with pytest.raises(PlanError, match=r'Protect.segment must be "first" or "second", or None'):
        Protect(segment=segment)


def test_a_model_that_cannot_tell_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"gets no token_type_ids.*token_ids=\(tokenizer.sep_token_id,\)"):
        prunepass.prune(roberta(), PLAN, {k: PAIRS[k] for k in ("input_ids", "attention_mask")})


def test_the_report_says_so() -> None:
    assert "the first part of a pair" in str(prunepass.explain(bert(), PLAN, PAIRS))
