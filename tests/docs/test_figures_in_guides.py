"""Figures that guides quote are those of the committed rows."""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

import pytest
from blocks import ROOT

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package
sys.path.insert(0, str(ROOT / "docs" / "_hooks"))

from benchmarks.store import read
from benchmarks.tasks.accuracy import by_task
from short_tables import sections

DOCS = ROOT / "docs"
UNPRUNED, TOME = "unpruned", "ToMe"
KEYS = "merge, keys in two sets, each after attention, evenly"
#: rows of the tables of images, from top to bottom, as the benchmark calls them
GUIDE = (
    UNPRUNED,
    KEYS,
    "merge, likeness, three, evenly",
    "merge, likeness, three",
    "drop, attention, three",
    "drop, norm, three",
)
STARTED = (UNPRUNED, TOME, KEYS, "merge, likeness, three, evenly", "drop, attention, three")


def prose(page: str) -> str:
    return " ".join((DOCS / page).read_text(encoding="utf-8").split())


def table(page: str, head: str) -> list[list[str]]:
    """The cells under the first table head that begins so, without marks of bold text."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(head))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return rows


def short(value: float, digits: int) -> str:
    """As tables of guides have it: .974, and 1."""
    return "1" if value == 1 else f"{value:.{digits}f}".removeprefix("0")


def images(photographs: int) -> dict[str, dict[str, Any]]:
    groups = [group for group in read("images") if group.shared.get("photographs") == photographs]
    dense = {
        "flops_ratio": 1,
        "cosine_class": 1,
        "cosine_mean": 1,
        "found_class": groups[0].shared["dense_found_class"],
    }
    return {UNPRUNED: dense, **{row["way"]: row for group in groups for row in group.rows}}


def test_scorers_of_images() -> None:
    rows = images(100)
    found = [row[3:] for row in table("guides/images.md", "| tokens | scorer |")]
    wanted = [
        [short(one["cosine_class"], 3), short(one["cosine_mean"], 3), short(one["found_class"], 2)]
        for one in (rows[way] for way in GUIDE)
    ]
    assert found == wanted


def test_what_images_cost() -> None:
    rows = images(100)
    found = [row[1:] for row in table("getting-started/images.md", "| way | FLOPs ratio |")]
    names = ("cosine_class", "cosine_mean", "found_class")
    wanted = [[f"{one['flops_ratio']:.2f}", *(short(one[n], 2) for n in names)] for one in (rows[w] for w in STARTED)]
    assert found == wanted


def test_images_among_many_and_their_times() -> None:
    rows, text = images(1000), prose("guides/images.md")
    dense, tome, keys = (rows[way] for way in (UNPRUNED, TOME, KEYS))
    share = [f"{100 * one['found_class']:.0f} %" for one in (keys, dense, tome)]
    near = [short(one[name], 3) for one in (keys, tome) for name in ("cosine_class", "cosine_mean")]
    assert (
        f"finds {share[0]} by the class vector where the unpruned model finds {share[1]} and ToMe {share[2]} "
        f"(cosines {near[0]} and {near[1]}, ToMe {near[2]} and {near[3]})"
    ) in text
    (timed,) = (group for group in read("images") if group.shared.get("speed") == "each after attention")
    ms = {row["way"]: row["ms"] for row in timed.rows}
    whole, pruned, other = ms["dense"], ms["merge, keys in two sets"], ms["ToMe, PyTorch"]
    assert f"{whole / pruned:.2f} times for a stage in each block ({whole:.0f} and {pruned:.0f} ms)" in text
    assert f"and {other:.0f} ms for ToMe in PyTorch" in text


def test_reranking() -> None:
    measured = {row[0]: [cell.strip("*") for cell in row[1:4]] for row in dict(sections("accuracy.md"))["reranking"]}
    whole, (_, half, fewer) = measured["dense"][0], measured["both together"]
    names = ("text cut short", "attention, training-free", "trained predictors, frozen model", "both together")
    found = [row[1:] for row in table("getting-started/reranker.md", "| MRR@10")]
    assert found == [[whole if i == 0 else "", *measured[name][1:]] for i, name in enumerate(names)]
    said = f"it has {half} against {whole}, at 2/5 it loses {float(whole) - float(fewer):.1f} points"
    assert said in prose("figures.md")


def test_dropping_and_merging_of_embeddings() -> None:
    found = {(row[0], row[1]): row[2:] for row in table("guides/plan.md", "| scorer | keep |")}
    wanted = {
        (group.shared["scorer"], group.shared["stages"]): [
            f"{short(row['cosine'], 3)}, {short(row['overlap'], 3)}" for row in group.rows
        ]
        for group in read("merge-embeddings")
    }
    assert found == wanted


@pytest.mark.parametrize("page", ["guides/int8.md", "figures.md", "reliability/promises.md"])
def test_what_int8_changes(page: str) -> None:
    rows = {(group.shared["runtime"], row["way"]): row for group in read("int8-agreement") for row in group.rows}
    text = prose(page)
    same = {runtime: f"{100 * rows[runtime, 'zeros']['same_tokens']:.1f} %" for runtime, way in rows if way == "zeros"}
    near = {key: f"{row['cosine']:.3f}" for key, row in rows.items()}
    one, other = "OpenVINO", "ONNX Runtime"
    assert f"{one}'s int8 model keeps {same[one]} of the tokens that its float32 one keeps" in text
    if page == "reliability/promises.md":
        return
    assert f"at a mean cosine of {near[one, 'lens']}" in text
    assert f"{other}'s {same[other]} and {near[other, 'lens']}" in text
    if page == "guides/int8.md":
        assert f"With nothing pruned the cosines are {near[one, 'unpruned']} and {near[other, 'unpruned']}" in text
        assert f"The {near[one, 'lens']} above was measured" in text


def test_more_than_half_of_what_int8_changes_is_its_own() -> None:
    for group in read("int8-agreement"):
        missing = {row["way"]: 1 - row["cosine"] for row in group.rows}
        assert missing["unpruned"] > missing["lens"] / 2
    assert "More than half of what is missing to 1 is missing with nothing pruned, too" in prose("figures.md")


def test_pairs_and_questions() -> None:
    tasks = dict(sections("accuracy.md"))
    wanted = []
    for name in ("mrpc", "stsb", "squad"):
        measured = {row[0]: [cell.strip("*").split(" ")[0] for cell in row[1:4]] for row in tasks[name]}
        ways = ("text cut short", "trained predictors, frozen model", "both together", "SDTP")
        wanted.append([measured["dense"][0], *(measured[way][budget] for budget in (1, 2) for way in ways)])
    found = [row[1:] for row in table("getting-started/pairs-and-questions.md", "| task |")]
    assert found == wanted
    (*_, both, sdtp), (*_, questions, questions_sdtp) = found[1], found[2]
    assert f"(STS-B {sdtp} against {both}, SQuAD {questions_sdtp} against {questions} at 2/5)" in prose(
        "guides/train.md"
    )


def test_short_texts() -> None:
    times = dict(sections("deployed.md"))["Milliseconds a text"]
    speed = {row[0]: row[-1].rstrip("x") for row in times[1:]}
    precision = {row[0]: row[2] for row in times[1:]}
    lost = {}
    for one in by_task(read("accuracy")):
        scores = [one.score("both", Fraction(budget)) for budget in ("1/2", "2/5")]
        lost[one.name] = [f"{100 * (one.dense - score):.1f}" for score in scores if score is not None]
    assert [precision[name] for name in ("sst2", "mrpc", "stsb", "rte")] == ["f32", "f32", "bf16", "bf16"]
    found = f"lost {lost['sst2'][1]} points"
    assert f"{found} (88.2 to 86.4) and was {speed['sst2']} times as fast" in prose("getting-started/classifier.md")
    bf16 = f"{speed['stsb']} (STS-B) and {speed['rte']} (RTE)"
    pairs, plan, figures = (
        prose(p) for p in ("getting-started/pairs-and-questions.md", "guides/plan.md", "figures.md")
    )
    assert f"{bf16} times as fast there in bf16, and {speed['mrpc']} times in float32 (MRPC)" in pairs
    assert f"no such stage: {' and '.join(lost['mrpc'])}." in pairs
    assert f"in bf16 no: {bf16} at 2/5" in plan
    assert f"MRPC lost {lost['mrpc'][1]} and was {speed['mrpc']} times as fast" in plan
    assert f"SST-2 loses {' and '.join(lost['sst2'])} points" in figures
    assert f"MRPC {' and '.join(lost['mrpc'])} (" in figures
    assert f"embeddings {lost['stsb-embedding'][0]} and {lost['stsb-embedding'][1]} (" in figures
    short_texts = ("sst2", "mrpc", "stsb", "stsb-embedding")  # the dense model of RTE is near guessing
    points = [float(lost[name][1]) for name in (*short_texts, "cranfield", "reranking")]
    between = f"{min(points):.0f} to {max(points):.0f} points"
    assert f"it loses {between}" in figures
    assert f"for {between} at 2/5" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_how_long_to_train() -> None:
    told = prose("getting-started/pairs-and-questions.md")
    measured = {}
    for group in read("training-length"):
        if (group.shared["task"], group.shared["method"], group.shared["seed"]) != ("stsb", "both", 0):
            continue
        rows = {row["budget"]: row for row in group.rows if row["row"] == "both"}
        one, other = (f"{100 * rows[budget]['spearman']:.1f}" for budget in ("1/2", "2/5"))
        measured[rows["1/2"]["training"]["steps"]] = (one, other)
        assert f"(dense {100 * group.shared['dense']['spearman']:.1f}, `both`" in told
    short, long, longest = (" and ".join(measured[steps]) for steps in (180, 719, 1438))
    figures = f"had {short} at 1/2 and 2/5 after 180 steps of 32 pairs, {long} after 719, and {longest} after 1,438"
    assert figures in told
