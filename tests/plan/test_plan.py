"""The plan: what it accepts, what it refuses and how it says so, and that it survives a folder."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from prunepass.errors import PlanError, PruneError, WeightsError
from prunepass.plan import Protect, PrunePlan, ScorerSpec, Stage, kept_count

shares = st.fractions(min_value=Fraction(1, 50), max_value=1, max_denominator=50)
protects = st.builds(
    Protect,
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    last_share=st.fractions(min_value=0, max_value=Fraction(9, 10), max_denominator=20),
)


@st.composite
def plans(draw: st.DrawFn) -> PrunePlan:
    places = sorted(draw(st.sets(st.tuples(st.integers(0, 9), st.booleans()), max_size=5)))
    keeps = sorted(draw(st.lists(shares, min_size=len(places), max_size=len(places))), reverse=True)
    scorers = st.sampled_from([None, "norm", {"name": "random", "seed": 7}])
    stages = [Stage(p[0], k, draw(scorers), p[1]) for p, k in zip(places, keeps, strict=True)]
    return PrunePlan(tuple(stages), draw(st.sampled_from(["attention", "norm"])), draw(protects))


# -- counts ------------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 5000), keep=shares, protect=protects)
def test_counts_are_those_of_the_contract(n: int, keep: Fraction, protect: Protect) -> None:
    assert kept_count(n, keep, protect) == oracle.count(n, keep, protect)


@given(n=st.integers(1, 5000), keep=shares, protect=protects)
def test_counts_fit_the_row_and_the_tokens_protected_by_position(n: int, keep: Fraction, protect: Protect) -> None:
    k = kept_count(n, keep, protect)
    last = max(protect.last, math.ceil(protect.last_share * n))
    assert max(1, min(n, protect.first + last)) <= k <= n


def clamp_low(a: Any, b: Any) -> Any:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def clamp_high(a: Any, b: Any) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("keep", [1 / 3, 2 / 3, 0.1, 0.7, 0.123456789, 1 / 7, "1/3"])
@pytest.mark.parametrize("protect", [Protect(), Protect(2, 1), Protect(last_share=0.1)])
def test_counts_of_tensors_agree_with_exact_ones(keep: Any, protect: Protect) -> None:
    """Integer tensors and compiled integers have 64 bits: a long text must not overflow them."""
    held = Stage(1, keep).keep
    lengths = [0, 1, 2, 3, 10, 511, 512, 4096, 131072, 1 << 20]
    counts = kept_count(torch.tensor(lengths), held, protect, minimum=clamp_high, maximum=clamp_low)
    assert counts.tolist() == [oracle.count(n, held, protect) for n in lengths]


def test_short_forms_with_many_stages_keep_their_counts_in_64_bits() -> None:
    plan = PrunePlan.short(0.93, layers=list(range(1, 24)))
    for stage in plan.stages:
        count = kept_count(torch.tensor(100_000), stage.keep, plan.protect, minimum=clamp_high, maximum=clamp_low)
        assert count == oracle.count(100_000, stage.keep, plan.protect)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (0.1, Fraction(1, 10)),
        (0.7, Fraction(7, 10)),
        ("7/10", Fraction(7, 10)),
        ("0.25", Fraction(1, 4)),
        (1, Fraction(1)),
    ],
)
def test_keep_is_held_as_an_exact_fraction(value: Any, held: Fraction) -> None:
    assert Stage(0, value).keep == held


def test_ten_tokens_at_seven_tenths_are_seven() -> None:
    # 0.7 * 10 is 7.000000000000001 in floating point in some orders, and its ceiling 8.
    assert kept_count(10, Stage(0, 0.7).keep, Protect()) == 7
    assert kept_count(30, Stage(0, 0.1).keep, Protect()) == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep", [0, 0.0, -0.5, 1.5, "3/2", "nan", "much", None, True, float("nan"), float("inf"), "1/0"]
)
def test_keep_outside_its_range_is_refused(keep: Any) -> None:
    with pytest.raises(PlanError, match="layer 3"):
        Stage(3, keep)


@pytest.mark.parametrize("layer", [-1, 1.0, "2", None, True])
def test_layer_must_be_a_block_number(layer: Any) -> None:
    with pytest.raises(PlanError, match=r"Stage\.layer"):
        Stage(layer, 0.5)


def test_rising_keeps_are_refused_with_both_places() -> None:
    with pytest.raises(PlanError, match=r"rises from 1/4 \(before block 1\) to 1/2 \(after the attention of block 2\)"):
        PrunePlan((Stage(1, 0.25), Stage(2, 0.5, after_attention=True)))


@pytest.mark.parametrize(
    "stages",
    [
        (Stage(2, 0.5), Stage(1, 0.5)),
        (Stage(2, 0.5), Stage(2, 0.5)),
        (Stage(2, 0.5, after_attention=True), Stage(2, 0.5)),
        (Stage(2, 0.5, after_attention=True), Stage(2, 0.25, after_attention=True)),
    ],
)
def test_stages_out_of_order_are_refused(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(PlanError, match="order of the model"):
        PrunePlan(stages)


def test_before_and_after_the_attention_of_one_block_is_in_order() -> None:
    plan = PrunePlan((Stage(2, 0.5), Stage(2, 0.5, after_attention=True), Stage(3, 0.5)))
    assert [s.place for s in plan.stages] == ["before block 2", "after the attention of block 2", "before block 3"]


@pytest.mark.parametrize(
    "stages", [Stage(1, 0.5), "stages", None, [0.5], [Stage(1, 0.5), {"layer": 2, "keep": 0.5}]], ids=repr
)
def test_stages_must_be_a_list_of_stages(stages: Any) -> None:
    with pytest.raises(PlanError, match=r"PrunePlan\.stages"):
        PrunePlan(stages)


@pytest.mark.parametrize(
    "options",
    [{"first": -1}, {"last": 1.5}, {"token_ids": 3}, {"token_ids": "ab"}, {"token_ids": [-2]}, {"last_share": 1}],
)
def test_protect_refuses_nonsense_by_the_name_of_the_field(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=rf"Protect\.{next(iter(options))}"):
        Protect(**options)


@pytest.mark.parametrize("scorer", [3, None, {"seed": 1}, {"name": 5}])
def test_scorer_must_have_a_name(scorer: Any) -> None:
    with pytest.raises(PlanError, match="scorer"):
        PrunePlan((Stage(1, 0.5),), scorer)


def test_plans_are_values() -> None:
    one, two = (PrunePlan([Stage(1, 0.5)], "norm") for _ in range(2))
    assert one == two
    assert hash(one.stages) == hash(two.stages)
    with pytest.raises(AttributeError):
        one.stages[0].keep = Fraction(1)  # type: ignore[misc]  # frozen: the point of the test


# -- JSON and folders --------------------------------------------------------------------------------------------------


@given(plan=plans())
def test_json_round_trip(plan: PrunePlan) -> None:
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_json_is_plain_and_readable() -> None:
    plan = PrunePlan(
        (Stage(2, 0.7), Stage(4, "1/3", {"name": "random", "seed": 7}, True)), protect=Protect(token_ids=[102])
    )
    data = json.loads(plan.to_json())
    assert data["stages"][0] == {"layer": 2, "keep": "7/10"}
    assert data["stages"][1] == {
        "layer": 4,
        "keep": "1/3",
        "scorer": {"name": "random", "seed": 7},
        "after_attention": True,
    }
    assert data["protect"]["token_ids"] == [102]


def test_folder_round_trip_with_weights(tmp_path: Path) -> None:
    weights = {"stages.0.a.weight": torch.randn(3, 4), "stages.1.a.bias": torch.randn(2, dtype=torch.float64)}
    plan = PrunePlan((Stage(1, 0.5), Stage(2, 0.25)), "one_s_own", weights=weights)
    plan.save_pretrained(tmp_path / "plan")
    back = PrunePlan.from_pretrained(tmp_path / "plan")
    assert back == plan
    assert set(back.weights) == set(weights)
    for name, tensor in weights.items():
        assert back.weights[name].dtype == tensor.dtype
        assert torch.equal(back.weights[name], tensor)
    assert set(back.weights_of(0)) == {"a.weight"}
    assert set(back.weights_of(1)) == {"a.bias"}


def test_saving_a_plan_without_weights_over_one_with_weights_leaves_none(tmp_path: Path) -> None:
    PrunePlan((Stage(1, 0.5),), "one_s_own", weights={"stages.0.w": torch.zeros(1)}).save_pretrained(tmp_path)
    PrunePlan((Stage(1, 0.5),), "norm").save_pretrained(tmp_path)
    assert PrunePlan.from_pretrained(tmp_path).weights == {}


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no-such.*prunepass\.json"):
        PrunePlan.from_pretrained(tmp_path / "no-such")


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    from safetensors.torch import save_file

    PrunePlan((Stage(1, 0.5),), "mlp").save_pretrained(folder)
    save_file(tensors, folder / "predictors.safetensors", metadata=metadata)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"stages.0.w": torch.randn(64)}, {"format": "prunepass-predictors"})
    file = tmp_path / "predictors.safetensors"
    for damage in (file.read_bytes()[:-40], file.read_bytes()[:6], b"", b"\x00" * 300):
        file.write_bytes(damage)
        with pytest.raises(WeightsError, match=r"predictors\.safetensors.*damaged"):
            PrunePlan.from_pretrained(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"stages.0.w": torch.randn(4)}, {"format": "prunepass-predictors"})
    torch.save({"stages.0.w": torch.randn(4)}, tmp_path / "predictors.safetensors")
    with pytest.raises(WeightsError):
        PrunePlan.from_pretrained(tmp_path)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"encoder.weight": torch.randn(4)}, {"format": "pt"})
    with pytest.raises(WeightsError, match="not written by prunepass"):
        PrunePlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["stages.1.w", "stages.x.w", "stages.0", "other.0.w"])
def test_weights_of_no_stage_are_refused(tmp_path: Path, key: str) -> None:
    save_tensors(tmp_path, {key: torch.randn(4)}, {"format": "prunepass-predictors"})
    with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
        PrunePlan.from_pretrained(tmp_path)


GOOD: dict[str, Any] = {"stages": [{"layer": 1, "keep": "1/2"}]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stages": [{"layer": 1, "keeps": 0.5}]}, r"'keeps' in stages\[0\].*Did you mean 'keep'"),
        (GOOD | {"protec": {}}, r"'protec'.*Did you mean 'protect'"),
        (GOOD | {"protect": {"frist": 1}}, r"'frist' in protect.*'first'"),
        ({"stages": [{"layer": 1}]}, r"stages\[0\] lacks keep"),
        ({}, "no 'stages'"),
        ({"stages": {"layer": 1}}, "must be a list"),
        ({"stages": [3]}, r"stages\[0\] must be a JSON object"),
        (GOOD | {"version": 99}, "99"),
        (GOOD | {"format": "other"}, "not a prunepass plan"),
        ([1], "JSON object"),
    ],
)
def test_wrong_json_is_refused_where_it_is_wrong(data: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        PrunePlan.from_json(json.dumps(data))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(PlanError, match="not valid JSON"):
        PrunePlan.from_json("{")


def test_plan_errors_are_value_errors_and_ours() -> None:
    assert issubclass(PlanError, PruneError)
    assert issubclass(PlanError, ValueError)
    assert issubclass(WeightsError, PlanError)


# -- short forms -------------------------------------------------------------------------------------------------------


def test_one_share_multiplies_along_the_layers() -> None:
    plan = PrunePlan.short(0.5, [2, 4, 5])
    assert [(s.layer, s.keep) for s in plan.stages] == [(2, Fraction(1, 2)), (4, Fraction(1, 4)), (5, Fraction(1, 8))]


def test_a_list_gives_each_layer_its_share_of_the_original() -> None:
    plan = PrunePlan.short([0.5, 0.4], [2, 4], "norm", {"first": 2})
    assert [s.keep for s in plan.stages] == [Fraction(1, 2), Fraction(2, 5)]
    assert plan.scorer == ScorerSpec("norm")
    assert plan.protect == Protect(first=2)


@pytest.mark.parametrize(
    ("keep", "layers", "words"),
    [(0.5, [], "layers"), (0.5, 3, "layers"), ([0.5], [1, 2], "1 shares for 2"), ("x", [1], "keep"), (2, [1], "keep")],
)
def test_short_form_refuses_nonsense(keep: Any, layers: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        PrunePlan.short(keep, layers)


@pytest.mark.parametrize("layers", [2, 3, 4, 6, 12, 24, 96])
def test_default_plan_fits_every_depth(layers: int) -> None:
    stages = PrunePlan.default(layers).stages
    assert stages
    assert all(1 <= s.layer < layers and Fraction(1, 2) <= s.keep < 1 for s in stages)


def test_default_plan_of_one_block_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        PrunePlan.default(1)


# -- the reference itself ----------------------------------------------------------------------------------------------


def test_the_reference_selection_on_rows_worked_by_hand() -> None:
    protect = SimpleNamespace(first=1, last=0, token_ids=(7,), last_share=Fraction(0))
    scores = [0.0, 3.0, 5.0, 5.0, 1.0, float("nan"), 9.0, 9.0]
    live = [True] * 6 + [False] * 2
    ids = [1, 2, 3, 4, 7, 5, 7, 7]

    def kept(keep: Fraction, alive: list[bool] = live) -> list[int]:
        row = oracle.select_row(scores, alive, live, ids, keep, protect)
        return [t for t, stays in enumerate(row) if stays]

    assert kept(Fraction(1, 6)) == [0]  # the first token before any other
    assert kept(Fraction(1, 3)) == [0, 4]  # then the protected id, whatever its score
    assert kept(Fraction(1, 2)) == [0, 2, 4]  # then the best; of two equals the earlier
    assert kept(Fraction(5, 6)) == [0, 1, 2, 3, 4]  # NaN comes last
    assert kept(Fraction(1)) == [0, 1, 2, 3, 4, 5]  # padding never
    assert kept(Fraction(1, 2), [True, True, False, True, False, True, False, False]) == [0, 1, 3]
