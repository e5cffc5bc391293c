"""Plans as JSON and from Python: what is refused, how fast and in what words."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_plans import one_line, trained

from prunepass.errors import OptionError, PlanError, PruneError, WeightsError
from prunepass.plan import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.plan.choice import choose
from prunepass.plan.draft import Draft
from prunepass.plan.files import PLAN_FILE, WEIGHTS_FILE

AT_ONCE = 2.0  # seconds; what took twenty must not come back, and this machine may be busy


# -- numbers and other arguments ---------------------------------------------------------------------------------------

HUGE = [
    "1e-400000",
    "1e400000",
    "1e-99999999999",
    "9" * 5000,
    "1/" + "3" * 5000,
    "0." + "1" * 5000,
    10**5000,
    Fraction(1, 3**50_000),
    Decimal("1e-400000"),
]


@pytest.mark.parametrize("keep", HUGE, ids=range(len(HUGE)))
def test_huge_numbers_are_refused_at_once_and_in_one_line(keep: Any) -> None:
    start = time.perf_counter()
    for make in (lambda: Stage(1, keep), lambda: Protect(last_share=keep), lambda: PrunePlan.short(keep, [1])):
        with pytest.raises(PlanError) as error:
            make()
        one_line(error)
    assert time.perf_counter() - start < AT_ONCE


@pytest.mark.parametrize(
    "keep", [np.float64(0.1), np.float32(0.1), np.float16(0.1), "0.1", "1/10", " 1e-1 ", Decimal("0.1"), 0.1]
)
def test_a_tenth_in_every_form(keep: Any) -> None:
    assert Stage(1, keep).keep == Fraction(1, 10)


def test_numbers_of_numpy_are_taken_as_whole_numbers() -> None:
    stage = Stage(np.int64(3), np.int64(1), after_attention=np.True_)
    assert stage == Stage(3, 1, after_attention=True)
    assert type(stage.layer) is int
    assert stage.after_attention is True
    assert Protect(np.int32(2), np.uint8(1), np.array([5, 7])) == Protect(2, 1, (5, 7))
    plan = PrunePlan.short(np.array([0.5, 0.25]), np.arange(1, 3))
    assert plan == PrunePlan.short([0.5, 0.25], (1, 2)) == PrunePlan.short(("1/2", "1/4"), range(1, 3))
    assert json.loads(plan.to_json())["stages"][0] == {"layer": 1, "keep": "1/2"}


@pytest.mark.parametrize("flag", ["false", "true", 0, 1, None, "no", [], np.int64(1)])
def test_a_flag_is_true_or_false(flag: Any) -> None:
    with pytest.raises(PlanError, match=r"Stage\.after_attention must be true or false"):
        Stage(1, 0.5, after_attention=flag)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stage(True, 0.5),
        lambda: Stage(np.True_, 0.5),
        lambda: Stage(2**31, 0.5),
        lambda: Stage(1, np.True_),
        lambda: Stage(1, torch.tensor([0.5, 0.5])),
        lambda: Stage(1, 0.5, scorer=3),
        lambda: Protect(token_ids={1: 2}),
        lambda: Protect(token_ids={1, 2}),
        lambda: Protect(token_ids=[10**30]),
        lambda: Protect(first=10**30),
        lambda: PrunePlan((), restore=np.array(["last", "zeros"])),
        lambda: PrunePlan((), weights=[1]),
        lambda: PrunePlan((), weights={"stages.0.w": 1}),
        lambda: PrunePlan((), weights={3: torch.zeros(1)}),
        lambda: ScorerSpec(""),
        lambda: ScorerSpec("random", ((1, 2),)),
        lambda: ScorerSpec.of({"name": "own", "x": object()}),
        lambda: ScorerSpec.of({"name": "own", "x": float("nan")}),
        lambda: ScorerSpec.of({"name": "own", "x": 10**400}),
        lambda: ScorerSpec.of({"name": "own", 3: 1}),
        lambda: PrunePlan.short(0.5, {2, 1}),
        lambda: PrunePlan.short(0.5, {"a": 1}),
        lambda: PrunePlan.sdtp(12, num_stages="x"),
        lambda: PrunePlan.sdtp("12"),
    ],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any]) -> None:
    with pytest.raises(PlanError) as error:
        make()
    one_line(error)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"keep": 0.5, "layer": [1]}, "'layer' in the plan's short form.*'layers'"),
        ({"keep": 0.5}, "short form, layers"),
        ({2: 0.5, 4: 0.3}, r'names, not layers.*"layers": .2, 4., "keep": .0.5, 0.3.'),
        ({}, "keep and layers"),
    ],
)
def test_short_forms_as_mappings(form: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        choose(form)
    short = PrunePlan.short(0.5, [1])
    assert choose({"keep": 0.5, "layers": [1], "restore": "last"}).plan == short
    open_ = choose({"keep": 0.5, "layers": [1]}).plan  # the model says how it restores
    assert isinstance(open_, Draft)
    assert open_.completed(PrunePlan([], restore="zeros")) == dataclasses.replace(short, restore="zeros")


def test_options_of_scorers_are_held_as_plain_data() -> None:
    spec = ScorerSpec.of({"name": "own", "sizes": [1, np.int64(2)], "rate": np.float32(0.5), "deep": {"a": [1]}})
    assert ScorerSpec.of(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.to_json() == {"name": "own", "sizes": [1, 2], "rate": 0.5, "deep": {"a": [1]}}


# -- the JSON ----------------------------------------------------------------------------------------------------------

GOOD = '{"stages": [{"layer": 1, "keep": "1/2"}]}'
TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n ", "empty"),
    "a list": (b"[1]", "JSON object, not list"),
    "a number": (b"3", "JSON object, not int"),
    "latin-1": ('{"stages": [],\n "x": "\xe4"}'.encode("latin-1"), r"not UTF-8: line 2"),
    "utf-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "nested lists": (b"[" * 100_000, "nested too deep"),
    "nested objects": (b'{"a":' * 100_000, "nested too deep"),
    "nested in a scorer": (
        GOOD[:-1].encode() + b', "scorer": {"name": "own", "x": ' + b"[" * 300 + b"]" * 300 + b"}}",
        "plain data",
    ),
    "a whole number of many digits": (GOOD.replace("1,", "1" * 5000 + ",").encode(), "5000 digits"),
    "a fraction of many digits": (GOOD.replace('"1/2"', "0." + "1" * 5000).encode(), "5002 characters"),
    "a huge exponent": (GOOD.replace('"1/2"', "1e999999999").encode(), "1e999999999"),
    "a huge exponent in text": (GOOD.replace("1/2", "1e-400000").encode(), "keep of the stage"),
    "NaN": (GOOD.replace('"1/2"', "NaN").encode(), "NaN"),
    "Infinity": (GOOD.replace('"1/2"', "-Infinity").encode(), "-Infinity"),
    "a flag as text": (GOOD.replace('"1/2"', '"1/2", "after_attention": "false"').encode(), "true or false"),
    "a key twice": (GOOD.replace('"1/2"', '"1/2", "keep": "1/3"').encode(), "'keep' twice"),
    "a key twice at the top": (GOOD.replace("{", '{"stages": [], ', 1).encode(), "'stages' twice"),
    "weights inside": (GOOD.replace("{", '{"weights": {}, ', 1).encode(), "'weights'"),
    "a version that is true": (GOOD.replace("{", '{"version": true, ', 1).encode(), "version True"),
    "a layer as text": (GOOD.replace("1,", '"1",').encode(), r"Stage\.layer"),
    "a layer with a point": (GOOD.replace("1,", "1.0,").encode(), r"Stage\.layer"),
    "no protect": (GOOD.replace("{", '{"protect": null, ', 1).encode(), "protect must be a JSON object"),
    "cut short": (GOOD[:-3].encode(), "not valid JSON"),
    "two documents": ((GOOD * 2).encode(), "not valid JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_files_are_refused_by_name_at_once_and_in_one_line(name: str, tmp_path: Path) -> None:
    content, words = TEXTS[name]
    (tmp_path / PLAN_FILE).write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(PlanError, match=words) as error:
        PrunePlan.from_pretrained(tmp_path)
    assert str(tmp_path / PLAN_FILE) in one_line(error)
    assert time.perf_counter() - start < AT_ONCE


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert PrunePlan.from_pretrained(tmp_path) == PrunePlan((Stage(1, 0.5),))


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / PLAN_FILE).open("wb") as file:
        file.truncate(10**9)  # of holes
    start = time.perf_counter()
    with pytest.raises(PlanError, match="1000 MB large"):
        PrunePlan.from_pretrained(tmp_path)
    assert time.perf_counter() - start < AT_ONCE


def test_a_folder_in_a_file_s_place(tmp_path: Path) -> None:
    (tmp_path / "one" / PLAN_FILE).mkdir(parents=True)
    with pytest.raises(PlanError, match=r"prunepass\.json is a folder"):
        PrunePlan.from_pretrained(tmp_path / "one")
    with pytest.raises(OptionError, match=r"prunepass\.json is a folder"):
        trained().save_pretrained(tmp_path / "one")
    trained().save_pretrained(tmp_path / "two")
    (tmp_path / "two" / WEIGHTS_FILE).unlink()
    (tmp_path / "two" / WEIGHTS_FILE).mkdir()
    with pytest.raises(WeightsError, match=r"predictors\.safetensors is a folder"):
        PrunePlan.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize("name", ["a\0b", 3, None, "x" * 5000])
def test_names_that_no_folder_can_have(name: Any) -> None:
    for act in (PrunePlan.from_pretrained, trained().save_pretrained):
        with pytest.raises(PruneError) as error:
            act(name)
        assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained().save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PlanError, match=r"prunepass\.json cannot be read: Permission denied"):
        PrunePlan.from_pretrained(tmp_path)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1/2", "1e-400000", "9" * 400, "last", "norm", "mlp", "1/0", "\ud800", 10**30]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WHOLE: dict[str, Any] = json.loads(
    PrunePlan(
        (Stage(1, 0.5), Stage(2, "1/3", {"name": "random", "seed": 7}, True)),
        "norm",
        Protect(2, 1, (101, 102), 0.1),
    ).to_json()
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    data: Any = {"plan": copy.deepcopy(WHOLE)}
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data["plan"])))
        parent: Any = data
        for key in ("plan", *path)[:-1]:
            parent = parent[key]
        last = ("plan", *path)[-1]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove" and path:
            del parent[last]
        elif kind == "add" and isinstance(parent[last], dict):
            parent[last][draw(st.text(max_size=6) | st.sampled_from(["keep", "scorer", "weights"]))] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
    text = json.dumps(data["plan"])
    if draw(st.booleans()):
        return text
    start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    return text[:start] + draw(st.text(max_size=4)) + text[end:]


@settings(max_examples=300, deadline=None)
@given(text=mutated())
def test_any_json_gives_a_plan_or_one_line(text: str) -> None:
    try:
        plan = PrunePlan.from_json(text)
    except PlanError as e:
        said = str(e)
    else:
        said = ""
    if said:
        assert "\n" not in said
        assert len(said) < 600
        return
    assert PrunePlan.from_json(plan.to_json()) == plan  # whatever is taken can be written


# -- what a notebook shows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Stage(2, 0.5), "Stage(2, '1/2')"),
        (Stage(2, 0.5, "norm", True), "Stage(2, '1/2', 'norm', after_attention=True)"),
        (Protect(), "Protect()"),
        (Protect(4, 1, (102,), 0.1), "Protect(first=4, last=1, token_ids=(102,), last_share='1/10')"),
        (ScorerSpec.of({"name": "random", "seed": 7}), "ScorerSpec('random(seed=7)')"),
        (PrunePlan.short(0.5, [2, 4]), "PrunePlan([Stage(2, '1/2'), Stage(4, '1/4')], 'attention', Protect())"),
        (trained(), "PrunePlan([Stage(1, '1/2')], 'mlp', Protect(), 4 weights)"),
    ],
)
def test_short_reprs(value: Any, shown: str) -> None:
    assert repr(value) == shown


def test_reprs_of_long_plans_are_short() -> None:
    plan = PrunePlan.short(0.99, range(1, 90), {"name": "own", "x": "y" * 999}, Protect(token_ids=range(9999)))
    assert len(repr(plan)) < 500
