"""The report's forms (text, HTML, JSON) and the token arithmetic behind it, from figures made by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import date
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunepass.cost import CorpusFlops
from prunepass.errors import PlanError, RefusalError
from prunepass.plan import Protect, PrunePlan, Stage, kept_count
from prunepass.report.bench import Agreement, BenchResult, Timing
from prunepass.report.data import BlockRow, Flops, FusionRow, Fusions, PassRow, Refusal, Sentence, StageRow
from prunepass.report.html import render_html
from prunepass.report.report import Report
from prunepass.report.text import flops_text, plan_text, protect_text, ratio_text
from prunepass.report.tokens import count_formula, last_blocks, live_tokens, protection_warnings, tokens_at

PLAN = PrunePlan([Stage(1, 0.7), Stage(2, 0.5, after_attention=True)], protect=Protect(first=1, token_ids=(102,)))
WORDS = ("[CLS]", "prun", "##ing", "<b>", "&amp;", "words", "[SEP]")


@pytest.fixture
def report() -> Report:
    kind = "scaled_dot_product_attention"
    return Report(
        model="TinyModel",
        plan=PLAN,
        batch=2,
        length=10,
        blocks=(
            BlockRow(0, "layer.0", kind, "S", "S", 10, 10, 4000, 4000),
            BlockRow(1, "layer.1", kind, "ceil(7*S/10)", "ceil(7*S/10)", 7, 7, 4000, 2800),
            BlockRow(2, "layer.2", "softmax", "ceil(7*S/10)", "ceil(S/2)", 7, 5, 4000, 2400),
        ),
        stages=(
            StageRow(0, "before block 1", "layer.1", "attention", "7/10", "ceil(7*S/10)", 7),
            StageRow(1, "after the attention of block 2", "layer.2", "random(seed=3)", "1/2", "ceil(S/2)", 5),
        ),
        flops=Flops(
            rows=3,
            tokens=21,
            max_length=64,
            batch_size=2,
            dense=CorpusFlops(900_000, 40_000, 30_000),
            pruned=CorpusFlops(300_000, 25_000, 20_000),
            example_dense=12_000,
            example_pruned=9_200,
            scoring=92,
            moved=1234,
        ),
        passes=(PassRow("select", 2, 31, 0.0125), PassRow("restore", 1, 4, 0.002)),
        fusions=Fusions("openvino", "units of the compiled graph", (FusionRow("attention", 3, 2),)),
        warnings=("before block 1: too many <ids>",),
        sentence=Sentence(WORDS, (2, 0, 0, 0, 1, 2, 2)),
    )


# -- token arithmetic -----------------------------------------------------------------------------------------------

KEEPS = st.fractions(min_value=Fraction(1, 50), max_value=1, max_denominator=50)
SHARES = st.fractions(min_value=0, max_value=Fraction(49, 50), max_denominator=50)
PROTECTS = st.builds(Protect, first=st.integers(0, 4), last=st.integers(0, 4), last_share=SHARES)


@given(keep=KEEPS, protect=PROTECTS, length=st.integers(1, 700))
def test_formula_says_what_the_count_is(keep: Fraction, protect: Protect, length: int) -> None:
    names = {"S": Fraction(length), "ceil": math.ceil, "min": min, "max": max}
    assert eval(count_formula(keep, protect), names) == kept_count(length, keep, protect)


@pytest.mark.parametrize(
    ("keep", "protect", "text"),
    [
        ("1", Protect(), "S"),
        ("1", Protect(first=3), "S"),
        ("1/2", Protect(), "ceil(S/2)"),
        ("7/10", Protect(first=0), "ceil(7*S/10)"),
        ("1/2", Protect(first=2, last=2), "min(S, max(4, ceil(S/2)))"),
        ("1/2", Protect(last_share=Fraction(1, 10)), "min(S, max(1 + ceil(S/10), ceil(S/2)))"),
        ("1/2", Protect(0, 3, (), Fraction(1, 10)), "min(S, max(max(3, ceil(S/10)), ceil(S/2)))"),
    ],
)
def test_formula_text(keep: str, protect: Protect, text: str) -> None:
    assert count_formula(Fraction(keep), protect) == text


def test_share_alive_in_each_part_of_a_block() -> None:
    shares = [(tokens_at(PLAN, b, after_attention=False), tokens_at(PLAN, b, after_attention=True)) for b in range(4)]
    seven, half = Fraction(7, 10), Fraction(1, 2)
    assert shares == [(1, 1), (seven, seven), (seven, half), (half, half)]


def test_last_block_is_the_one_before_the_stage_or_the_stages_own() -> None:
    first = torch.tensor([[True, True, False, True]])
    second = torch.tensor([[True, False, False, True]])
    assert last_blocks(PLAN, [first, second], 5, (1, 4)).tolist() == [[4, 2, 0, 4]]


def test_a_stage_before_the_first_block_leaves_no_block() -> None:
    plan = PrunePlan([Stage(0, 0.5)])
    assert last_blocks(plan, [torch.tensor([[True, False]])], 3, (1, 2)).tolist() == [[2, -1]]


def test_without_stages_every_token_reaches_the_end() -> None:
    assert last_blocks(PrunePlan([]), [], 3, (2, 2)).tolist() == [[2, 2], [2, 2]]


def test_live_tokens_follow_the_mask_or_take_all() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert live_tokens({"attention_mask": mask}, (1, 3)).tolist() == [[True, True, False]]
    assert live_tokens({}, (1, 3)).tolist() == [[True, True, True]]


def test_warns_of_more_protected_ids_than_room() -> None:
    ids = torch.tensor([[7, 102, 102, 102, 102, 5, 5, 5, 5, 5], [7, 102, 5, 5, 0, 0, 0, 0, 0, 0]])
    live = ids != 0
    plan = PrunePlan([Stage(1, 0.7), Stage(2, 0.4)], protect=Protect(first=1, token_ids=(102,)))
    (warning,) = protection_warnings(plan, ids, live)  # 5 protected of 10: room for 7, then only for 4
    assert "before block 2: 5 tokens of row 0" in warning
    assert "leaves room for 4 (1 of 2 rows" in warning


def test_protected_padding_is_not_counted() -> None:
    ids = torch.tensor([[7, 5, 5, 102, 102, 102]])
    live = torch.tensor([[True, True, True, False, False, False]])
    plan = PrunePlan([Stage(1, 0.4)], protect=Protect(token_ids=(102,)))
    assert protection_warnings(plan, ids, live) == []


@pytest.mark.parametrize("ids", [None, torch.full((1, 8), 102)])
def test_nothing_to_warn_of_without_ids(ids: torch.Tensor | None) -> None:
    plan = PrunePlan([Stage(1, 0.2)], protect=Protect(token_ids=(102,) if ids is None else ()))
    assert protection_warnings(plan, ids, torch.ones(1, 8, dtype=torch.bool)) == []


# -- text -----------------------------------------------------------------------------------------------------------


def test_text_holds_every_figure(report: Report) -> None:
    text = str(report)
    for line in (
        r"TinyModel, pruned by prunepass",
        r"example: 2 rows of 10 tokens \(S = 10\)",
        r"protected: the first token; ids 102",
        r"1  after the attention of block 2  layer\.2 +random\(seed=3\)  +1/2 +ceil\(S/2\) +5",
        r"2  layer\.2  softmax +ceil\(7\*S/10\), then ceil\(S/2\) +7, 5 +4 k +2\.4 k",
        r"padded to the maximum \(64\) +900 k +300 k +3\.00x",
        r"padded to the batch +40 k +25 k +1\.60x",
        r"real tokens only +30 k +20 k +1\.50x",
        r"scoring on the example: 92 \(1\.0%\); elements sorted, gathered and masked: 1\.234 k",
        r"select +2 +31 +12\.5",
        r"Fusions kept on openvino",
        r"attention +3 +2",
        r"Warning: before block 1: too many <ids>",
    ):
        assert re.search(line, text), f"{line!r} is not in\n{text}"


def test_text_columns_are_aligned(report: Report) -> None:
    lines = str(report).splitlines()
    start = lines.index("Blocks") + 1
    rule, rows = lines[start + 1], lines[start + 2 : start + 5]
    gaps = [i for i, (a, b) in enumerate(pairwise(rule)) if a == b == " " and i > 1]
    assert gaps
    for row in rows:
        assert all(row.ljust(len(rule))[i] == " " for i in gaps)


def test_refusal_stands_instead_of_the_figures(report: Report) -> None:
    error = RefusalError("a convolution mixes tokens.", where="layer.1.conv", hint="Place the stage after it.")
    refused = Report("TinyModel", PLAN, 2, 10, refusals=(Refusal.of(error),))
    assert "Refused: layer.1.conv: a convolution mixes tokens.\n  Place the stage after it." in str(refused)
    assert "FLOPs" not in str(refused)
    page = render_html(refused)
    assert "<code>layer.1.conv</code>" in page
    assert "Place the stage after it." in page
    wrong_plan = Refusal.of(PlanError("Layer 9 is out of range."))
    assert wrong_plan == Refusal("Layer 9 is out of range.", None, None, "plan")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (22_347_251_712, "22.35 G"),
        (999_960, "1 M"),
        (5 * 10**15, "5 P"),
        (5 * 10**18, "5000 P"),
    ],
)
def test_flops_text(count: int, text: str) -> None:
    assert flops_text(count) == text


def test_ratio_text() -> None:
    assert ratio_text(3, 2) == "1.50x"
    assert ratio_text(3, 0) == "-"


@pytest.mark.parametrize(
    ("protect", "text"),
    [
        (Protect(), "the first token"),
        (Protect(first=0), "nothing"),
        (
            Protect(2, 1, (7, 8), Fraction(1, 10)),
            "the first 2 tokens; the last token; the last 1/10 of each row; ids 7, 8",
        ),
    ],
)
def test_protect_text(protect: Protect, text: str) -> None:
    assert protect_text(protect) == text


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_dict_is_json_and_complete(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert PrunePlan.from_dict(data["plan"]) == PLAN
    assert data["blocks"][2]["tokens_out"] == "ceil(S/2)"
    assert data["flops"]["dense"]["real_tokens"] == 30_000
    assert data["passes"][0] == {"name": "select", "changes": 2, "nodes_added": 31, "seconds": 0.0125}
    assert data["fusions"]["rows"] == [{"kind": "attention", "dense": 3, "pruned": 2}]
    assert data["sentence"]["words"] == list(WORDS)
    assert set(data) == set(vars(report))


# -- HTML -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest, and collects the sentence's tokens and whatever the page would load."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens: list[str] = []
        self.titles: list[str] = []
        self.loads: list[str] = []
        self._in_sentence = False
        self._in_token = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(tag)
        if tag in self.VOID:
            return
        self.open.append(tag)
        self._in_sentence |= given.get("class") == "sentence"
        if self._in_sentence and tag == "span":
            self.tokens.append("")
            self.titles.append(given.get("title") or "")
            self._in_token = True
        if tag == "sub":
            self._in_token = False

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"
        if tag == "p":
            self._in_sentence = False
        if tag == "span":
            self._in_token = False

    def handle_data(self, data: str) -> None:
        if self._in_sentence and self._in_token:
            self.tokens[-1] += data


def test_html_nests_and_loads_nothing(report: Report, tmp_path: Path) -> None:
    file = report.to_html(tmp_path / "deeper" / "report.html")
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_html_marks_the_tokens_that_leave_alone(report: Report) -> None:
    page = Page(render_html(report))
    assert page.tokens == ["[CLS]", "prun", "ing", "<b>", "&amp;", "words", "[SEP]"]
    early, late = "leaves after block 0", "leaves after block 1"
    assert page.titles == ["", early, early, early, late, "", ""]


def test_html_marks_are_the_stronger_the_earlier_a_token_leaves(report: Report) -> None:
    sentence = re.search(r'<p class="sentence">.*?</p>', render_html(report), re.DOTALL)
    assert sentence is not None
    assert [int(n) for n in re.findall(r"--share: (\d+)%", sentence[0])] == [67, 67, 67, 33]


def test_html_begins_with_the_model_the_plan_in_words_and_the_date(report: Report) -> None:
    page = render_html(report)
    words = "70 % of the tokens from block 1 on, 50 % after the attention of block 2, by attention scores"
    assert f"<title>TinyModel: {words}, {date.today().isoformat()}</title>" in page
    assert f'<h1>TinyModel</h1>\n<p class="lead">{words}.</p>' in page
    assert f"on {date.today().isoformat()}." in page


def test_plans_in_words() -> None:
    assert plan_text(PrunePlan([])) == "nothing pruned"
    many = PrunePlan([Stage(i, Fraction(10 - i, 10)) for i in range(1, 6)], "norm")
    assert (
        plan_text(many)
        == "90 % of the tokens from block 1 on, in 5 stages down to 50 % from block 5 on, by norm scores"
    )
    mixed = PrunePlan([Stage(1, 0.5, "norm"), Stage(2, 0.25)], "random")
    assert plan_text(mixed) == "50 % of the tokens from block 1 on, 25 % from block 2 on, by norm and random scores"


def test_html_shows_time_and_agreement_before_flops(report: Report) -> None:
    page = render_html(report)
    assert "Time and agreement: not measured" in page
    assert "prunepass bench MODEL" in page
    timing = Timing(20.0, 30.0, 50.0), Timing(12.5, 15.0, 80.0)
    agreement = (Agreement("last_hidden_state", 0.8, 0.9512, 0.1), Agreement("pooler_output", 0.71, None, 0.1))
    taken = BenchResult("openvino", 1, 4, 9, 3, 1, *timing, 1.6, (), None, {}, agreement, precision="bf16: <auto>")
    measured = render_html(taken.added_to(report))
    assert "not measured" not in measured
    assert "1.60x" in measured
    assert "12.5 ms a batch in place of 20.0 ms" in measured
    assert "<b>0.951</b><span>cosine to the dense last_hidden_state, averaged over tokens</span>" in measured
    assert "<b>0.710</b><span>cosine to the dense pooler_output</span>" in measured
    assert "bf16: &lt;auto&gt;" in measured
    assert measured.index("1.60x") < measured.index("fewer FLOPs")
    assert taken.added_to(report).to_dict()["measured"]["agreement"][1]["pooled_cosine"] is None


def test_html_bars_are_as_wide_as_the_page(report: Report) -> None:
    page = render_html(report)
    widths = [
        (float(a), float(b)) for a, b in re.findall(r'"in" style="width: (.*?)%".*?"out" style="width: (.*?)%"', page)
    ]
    assert widths == [(100.0, 100.0), (70.0, 70.0), (70.0, 50.0)]
    assert "<svg" not in page


def test_html_names_the_column_of_each_cell_for_narrow_screens(report: Report) -> None:
    page = render_html(report)
    cells, named = re.findall(r"<td\b", page), re.findall(r'<td\b[^>]* data-column="[^"]+"', page)
    assert len(cells) == len(named) > 20
    assert 'data-column="dense / pruned">1.50x' in page
    assert "overflow-x" not in page
    assert "attr(data-column)" in page


def test_html_escapes_what_comes_from_outside(report: Report) -> None:
    page = render_html(replace(report, model="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "too many &lt;ids&gt;" in page


def test_html_holds_the_figures(report: Report) -> None:
    text = render_html(report)
    for figure in ("1.50x", "padded to the maximum (64)", "Fusions kept on openvino", "ceil(7*S/10)"):
        assert figure in text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("\u0120the", "ory", "\u0120of"), ["the", "ory", "of"]),
        (("<s>", "\u2581the", "ory"), ["<s>", "the", "ory"]),
        (("101", "2023", "102"), ["101", "2023", "102"]),
    ],
)
def test_html_reads_the_marks_of_other_vocabularies(report: Report, words: tuple[str, ...], shown: list[str]) -> None:
    text = render_html(replace(report, sentence=Sentence(words, (0, 1, 2))))
    assert Page(text).tokens == shown
    glued = re.findall(r'class="token glued(?: left)?"[^>]*>([^<]*)', text)
    assert glued == [word for word in shown if word == "ory"]
