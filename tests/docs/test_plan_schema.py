"""The JSON schema of plans accepts what prunepass writes, and refuses what it refuses to read."""

from __future__ import annotations

import json
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.errors import PlanError
from prunepass.plan.files import shipped
from prunepass.plan.plan import RESTORES

jsonschema = pytest.importorskip("jsonschema")

FILE = Path(__file__).parent.parent.parent / "docs" / "reference" / "prunepass-plan.schema.json"
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

shares = st.fractions(Fraction(1, 10**4), 1, max_denominator=10**4)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
scorers = st.builds(
    lambda name, options: ScorerSpec.of({"name": name} | options),
    st.text(min_size=1, max_size=5),
    st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda key: key != "name"), plain, max_size=3),
)
protected = st.builds(
    Protect,
    first=st.integers(0, 2**31 - 1),
    last=st.integers(0, 9),
    token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    last_share=st.fractions(0, Fraction(9999, 10**4), max_denominator=10**4),
)


@st.composite
def plans(draw: st.DrawFn) -> PrunePlan:
    """Any plan at all, of up to four stages."""
    places = sorted(draw(st.sets(st.tuples(st.integers(0, 99), st.booleans()), max_size=4)))
    keeps = sorted((draw(shares) for _ in places), reverse=True)
    stages = [
        Stage(layer, keep, draw(st.none() | scorers), after) for (layer, after), keep in zip(places, keeps, strict=True)
    ]
    return PrunePlan(stages, draw(scorers), draw(protected), draw(st.sampled_from(RESTORES)))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_what_is_written_fits_the_schema(plan: PrunePlan) -> None:
    text = plan.to_json()
    VALIDATOR.validate(json.loads(text))
    assert PrunePlan.from_json(text) == plan


@pytest.mark.parametrize("name", shipped())
def test_plans_that_come_along_fit_the_schema(name: str) -> None:
    VALIDATOR.validate(PrunePlan.from_pretrained(name).to_dict())


def test_the_schema_is_one_and_names_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    defined = SCHEMA["$defs"]
    assert set(SCHEMA["properties"]) == {f.name for f in fields(PrunePlan)} - {"weights"} | {"format", "version"}
    assert set(defined["stage"]["properties"]) == {f.name for f in fields(Stage)}
    assert set(defined["protect"]["properties"]) == {f.name for f in fields(Protect)}
    assert tuple(SCHEMA["properties"]["restore"]["enum"]) == RESTORES


STAGE: dict[str, Any] = {"layer": 1, "keep": "1/2"}
#: what replaces a value somewhere in a plan: each type of JSON, and numbers out of range
WRONG = [None, True, -1, 2.5, 2**31, 1e300, "", "x", "1/0", [], [[]], {}, {"x": 1}, {"name": ""}, {"name": 3}, ["x"]]
PLACES: list[tuple[str | int, ...]] = [
    ("format",),
    ("version",),
    ("stages",),
    ("stages", 0),
    ("stages", 0, "layer"),
    ("stages", 0, "keep"),
    ("stages", 0, "scorer"),
    ("stages", 0, "after_attention"),
    ("stages", 0, "left over"),
    ("scorer",),
    ("protect",),
    ("protect", "first"),
    ("protect", "last"),
    ("protect", "token_ids"),
    ("protect", "last_share"),
    ("protect", "left over"),
    ("restore",),
    ("weights",),
    ("left over",),
]


def changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data: Any = PrunePlan([Stage(1, 0.5, "norm", True)], "random").to_dict()
    inside = data
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    return dict(data)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_what_is_refused_does_not_fit_the_schema(place: tuple[str | int, ...]) -> None:
    for value in WRONG:
        data = changed(place, value)
        assert VALIDATOR.is_valid(data) == is_read(data), f"{place} = {value!r}"


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"stages": [{"layer": 1}]},
        {"stages": [{"keep": "1/2"}]},
        {"stages": [STAGE], "scorer": {"seed": 7}},
        {"stages": [STAGE | {"keep": 0.00001}]},
        {"stages": [STAGE], "protect": {"last_share": 0.99999}},
        {"format": "other", "stages": []},
        {"version": 2, "stages": []},
    ],
)
def test_documents_that_are_no_plan(data: Any) -> None:
    assert not is_read(data)
    assert not VALIDATOR.is_valid(data)


UNSAID = {
    "a keep that rises": {"stages": [STAGE, {"layer": 2, "keep": "3/4"}]},
    "stages out of order": {"stages": [{"layer": 2, "keep": "1/2"}, STAGE]},
    "a keep above 1 as text": {"stages": [{"layer": 1, "keep": "3/2"}]},
    "a keep of 0 as text": {"stages": [{"layer": 1, "keep": "0"}]},
    "a share of 1 as text": {"stages": [], "protect": {"last_share": "1"}},
    "a layer with a point": {"stages": [{"layer": 1.0, "keep": "1/2"}]},
    "an option beyond 64 bits": {"stages": [], "scorer": {"name": "own", "x": 2**64}},
    "options too deep": {"stages": [], "scorer": {"name": "own", "x": [[[[[[[[[[1]]]]]]]]]]}},
}


@pytest.mark.parametrize("name", UNSAID)
def test_the_rules_that_a_schema_cannot_say_are_held_by_the_reader(name: str) -> None:
    """As the page on the plan format lists them."""
    assert VALIDATOR.is_valid(UNSAID[name])
    assert not is_read(UNSAID[name])


def is_read(data: Any) -> bool:
    try:
        PrunePlan.from_json(json.dumps(data))
    except PlanError:
        return False
    return True
