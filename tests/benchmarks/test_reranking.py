"""The accuracy benchmark's candidates to rank, and how their order is scored, on small examples written here."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.accuracy.candidates import cranfield_pairs, squad_pairs
from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import rank_at_10

TOWERS = ["The tower in Paris is tall.", "The river in Paris is long.", "A bridge of stone.", "A museum of art."]
STARS = ["The sun is a star.", "The moon is bright."]


def question(text: str, article: str, context: str) -> dict[str, Any]:
    return {"id": text, "article": article, "question": text, "context": context}


QUESTIONS = [
    question("how tall is the tower in Paris", "towers", TOWERS[0]),
    question("how long is the river", "towers", TOWERS[1]),
    question("what is the bridge made of", "towers", TOWERS[2]),
    question("what does the museum show", "towers", TOWERS[3]),
    question("what is the sun", "stars", STARS[0]),
    question("is the moon bright", "stars", STARS[1]),
]


def test_each_question_has_its_paragraph_among_wrong_ones() -> None:
    pairs = squad_pairs(QUESTIONS, every=1, alike=2, others=1)
    by_query = {q["id"]: [p for p in pairs if p["query"] == q["id"]] for q in QUESTIONS}
    for asked in QUESTIONS:
        mine = by_query[asked["id"]]
        assert [p["second"] for p in mine if p["label"] == 1] == [asked["context"]]
        assert len({p["text"] for p in mine}) == 1
    # the nearest of the same article: only one paragraph shares a word with the question
    near = {p["second"] for p in by_query["how tall is the tower in Paris"] if p["label"] == 0}
    assert TOWERS[1] in near
    assert len(by_query["what is the sun"]) <= 3  # its article has but one other paragraph


def test_every_so_many_question_and_the_same_each_time() -> None:
    pairs = squad_pairs(QUESTIONS, every=3, alike=2, others=0, among=3)
    assert [*dict.fromkeys(p["query"] for p in pairs)] == [QUESTIONS[0]["id"], QUESTIONS[3]["id"]]
    assert pairs == squad_pairs(QUESTIONS, every=3, alike=2, others=0, among=3)


def test_documents_judged_relevant_come_with_those_most_like_the_query() -> None:
    collection = [
        *({"text": text, "document": number} for number, text in enumerate(TOWERS, 1)),
        {"text": "", "document": 9},  # a document without text cannot be ranked
        {"text": "bridge of stone", "relevant": [4, 9]},
    ]
    pairs = cranfield_pairs(collection, candidates=2)
    assert {(p["second"], p["label"]) for p in pairs} == {(TOWERS[3], 1.0), (TOWERS[2], 0.0)}


def features(*queries: list[float]) -> Features:
    examples = [{"query": i, "label": label} for i, labels in enumerate(queries) for label in labels]
    return Features(examples, [], [], [])


def figures(values: list[float], *queries: list[float]) -> dict[str, float]:
    return rank_at_10([np.array([v], dtype=np.float32) for v in values], features(*queries))


def test_ranks() -> None:
    found = figures([0.1, 0.9, 0.5, 3.0, 2.0], [1.0, 0.0, 0.0], [1.0, 0.0])  # third of three, first of two
    assert found["mrr@10"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(4) + 1) / 2)


def test_a_constant_model_gains_nothing_from_ties() -> None:
    assert figures([0.5] * 3, [1.0, 0.0, 0.0])["mrr@10"] == pytest.approx(1 / 3)


def test_beyond_the_tenth_counts_nothing() -> None:
    values = [float(n) for n in range(12)]
    assert figures(values, [1.0] + [0.0] * 11) == {"mrr@10": 0.0, "ndcg@10": 0.0}


def test_several_right_ones() -> None:
    found = figures([3.0, 2.0, 1.0], [1.0, 0.0, 1.0])
    assert found["mrr@10"] == 1
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))
