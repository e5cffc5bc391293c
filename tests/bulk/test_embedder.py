"""Texts through exported folders: the results of `prune`, in the order of the texts, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import LABELS, classifier, encoder, expected, texts

pytest.importorskip("openvino")
pytest.importorskip("tokenizers")

from prunepass.bulk import Embedder
from prunepass.bulk.batches import Batch
from prunepass.bulk.cores import cores
from prunepass.bulk.encoding import Encoded
from prunepass.errors import DataError, ExportError, OptionError
from vocabulary import tiny_tokenizer

SMALL = {"cpus": 2, "tokens": 64, "window": 16}
FULL: dict[str, Any] = {**SMALL, "precision": "f32"}


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    return encoder(tmp_path_factory.mktemp("onnx"), to="onnx")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def rewritten(folder: Path, name: str, **values: Any) -> None:
    """Change settings in a JSON file."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_vectors_in_the_order_of_the_texts(folder: Path) -> None:
    given = texts(50)
    assert len({len(one.split()) for one in given}) > 10
    seen: list[tuple[int, int]] = []
    embedder = Embedder(folder, **FULL)
    found = embedder(given, lambda documents, tokens: seen.append((documents, tokens)))
    assert (embedder.kind, embedder.width, embedder.longest, embedder.runtime) == ("vector", 32, 64, "openvino")
    assert found.dtype == np.float32
    assert np.abs(found - expected(folder, given)).max() < 1e-4
    assert sum(documents for documents, _ in seen) == 50
    assert sum(tokens for _, tokens in seen) == sum(len(ids) for ids in tiny_tokenizer()(given)["input_ids"])
    assert len(seen) > 10
    assert embedder([]).shape == (0, 32)


def test_vectors_of_onnx_runtime(onnx_folder: Path) -> None:
    folder, given = onnx_folder, texts(40, 1)
    assert np.abs(Embedder(folder, **SMALL)(given) - expected(folder, given)).max() < 1e-4
    with pytest.raises(OptionError, match="precision='bf16' is for OpenVINO"):
        Embedder(folder, precision="bf16")
    with pytest.raises(OptionError, match="no setting 'threads'"):
        Embedder(folder, config={"threads": 1})


def test_labels(labelled: Path) -> None:
    folder, given = labelled, texts(30, 2)
    logits = expected(folder, given)
    embedder = Embedder(folder, **FULL)
    names = embedder(given)
    assert names.tolist() == [LABELS[i] for i in logits.argmax(1)]
    assert len(set(names)) > 1
    found = embedder({"text": np.array(given, dtype=object), "id": np.arange(30)})
    assert list(found) == ["text", "id", "label", "scores"]
    assert found["id"].tolist() == list(range(30))
    exact = torch.tensor(logits).softmax(1).numpy()
    assert np.abs(found["scores"] - exact).max() < 1e-4


def test_labels_that_do_not_exclude_each_other(labelled: Path, tmp_path: Path) -> None:
    folder, given = Path(shutil.copytree(labelled, tmp_path / "out")), texts(6, 2)
    rewritten(folder, "config.json", problem_type="multi_label_classification")
    embedder = Embedder(folder, **FULL)
    exact = 1 / (1 + np.exp(-expected(labelled, given)))
    assert embedder.kind == "scores"
    assert embedder.labels == LABELS
    assert np.abs(embedder(given) - exact).max() < 1e-4


def test_scores_of_pairs(tmp_path: Path) -> None:
    folder = classifier(tmp_path, labels=("score",))
    pairs = list(zip(texts(20, 3), texts(20, 4), strict=True))
    embedder = Embedder(folder, column="query", pair="document", **FULL)
    exact = expected(folder, pairs)[:, 0]
    assert embedder.pairs
    assert np.abs(embedder(pairs) - exact).max() < 1e-4
    assert np.ptp(exact) > 1e-2
    columns = {"query": [one for one, _ in pairs], "document": [two for _, two in pairs]}
    assert np.abs(embedder(columns)["score"] - exact).max() < 1e-4
    with pytest.raises(DataError, match="Text 0 is no pair of texts, which a model of pairs takes, but of type str"):
        embedder(["alone"])
    with pytest.raises(DataError, match="no column 'document'; there are 'query'"):
        embedder({"query": ["a"]})


def test_rows_that_are_padded_in_front(copied: Path) -> None:
    """Where the tokenizer says so: a model that reads the last slot was exported with it."""
    rewritten(copied, "tokenizer_config.json", padding_side="left", pad_token="[MASK]")
    embedder = Embedder(copied, **FULL)
    short, long = (Encoded([2, *range(5, 5 + n), 3], [0] * (n + 2)) for n in (1, 3))
    feed = embedder._feed(Batch([0, 1], [long, short], 6, 2))
    assert feed["input_ids"].tolist() == [[4, 2, 5, 6, 7, 3], [4, 4, 4, 2, 5, 3]]
    assert feed["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_a_fixed_batch_and_length(folder: Path, copied: Path) -> None:
    import openvino

    model = openvino.Core().read_model(folder / "openvino_model.xml")
    model.reshape({name: [4, 40] for name in ("input_ids", "attention_mask", "token_type_ids")})
    openvino.save_model(model, copied / "openvino_model.xml", compress_to_fp16=False)
    given = texts(21, 6)
    embedder = Embedder(copied, **FULL)
    assert embedder.longest == 40
    assert np.abs(embedder(given) - expected(folder, given)).max() < 1e-4


class TestWrongTexts:
    def test_are_told_of_and_the_others_run(self, folder: Path) -> None:
        good = texts(20, 7)
        long = "cat " * 80
        given: list[Any] = [*good[:5], None, *good[5:10], 3.5, long, "a \ud800 b", *good[10:]]
        attempt = Embedder(folder, **FULL).attempt(given)
        assert attempt.wrong == {
            5: "is null",
            11: "is no text but of type float",
            12: "has 82 tokens, and the longest that is taken has 64",
            13: "is no valid Unicode",
        }
        fine = [i for i in range(len(given)) if i not in attempt.wrong]
        assert np.abs(attempt.outputs[fine] - expected(folder, good)).max() < 1e-4
        assert np.isnan(attempt.outputs[sorted(attempt.wrong)]).all()
        with pytest.raises(DataError, match=r"Text 5 is null."):
            Embedder(folder, **FULL)(given)

    def test_long_ones_can_be_cut(self, folder: Path) -> None:
        long = ["cat sat on the mat " * 30, *texts(3)]
        found = Embedder(folder, truncate=True, **FULL)(long)
        assert np.abs(found - expected(folder, long)).max() < 1e-4
        short = Embedder(folder, truncate=True, max_length=10, **FULL)
        assert short.longest == 10
        assert np.abs(short(["cat sat on the mat " * 30]) - short(["cat sat on the mat cat sat on"])).max() < 1e-4

    @pytest.mark.parametrize("to", ["openvino", "onnx"])
    def test_that_fail_in_the_runtime_leave_the_others(self, to: str, folder: Path, onnx_folder: Path) -> None:
        folder = folder if to == "openvino" else onnx_folder
        embedder = Embedder(folder, **(FULL if to == "openvino" else SMALL))
        embedder.longest = None  # texts beyond the model's positions reach it
        good = texts(20, 8)
        given = [*good[:7], "cat " * 90, *good[7:15], "mat " * 99, *good[15:]]
        exact = expected(folder, good)
        for _ in range(2):  # a failed call leaves nothing behind
            attempt = embedder.attempt(given)
            assert sorted(attempt.wrong) == [7, 16]
            assert all(reason.startswith("fails in the model: ") for reason in attempt.wrong.values())
            fine = [i for i in range(len(given)) if i not in attempt.wrong]
            assert np.abs(attempt.outputs[fine] - exact).max() < 1e-4


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"no folder .*none. Write one with prunepass export"):
            Embedder(tmp_path / "none")

    def test_nothing_in_it(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"holds no exported model.*--to openvino"):
            Embedder(tmp_path)

    def test_another_format(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt2").touch()
        with pytest.raises(ExportError, match=r"holds a \.pt2 program.*--to openvino"):
            Embedder(tmp_path)

    def test_a_format_that_is_newer(self, copied: Path) -> None:
        file = copied / "openvino_model.xml"
        newer = file.read_text().replace('version="11"', 'version="99"', 1)
        assert 'version="99"' in newer
        file.write_text(newer)
        with pytest.raises(ExportError, match=r"OpenVINO \d+\.\d+\.\d+ cannot read .*openvino_model.xml"):
            Embedder(copied)

    def test_a_file_that_is_cut_off(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"no model")
        with pytest.raises(ExportError, match=r"ONNX Runtime \d+\.\d+\.\d+ cannot read .*model.onnx"):
            Embedder(tmp_path)

    def test_no_tokenizer(self, copied: Path) -> None:
        (copied / "tokenizer.json").unlink()
        with pytest.raises(ExportError, match=r"has no tokenizer.json. Export it again with .*tokenizer"):
            Embedder(copied)
        (copied / "tokenizer.json").write_text("{}")
        with pytest.raises(ExportError, match=r"tokenizer.json cannot be read"):
            Embedder(copied)

    def test_states_of_tokens(self, copied: Path) -> None:
        file = copied / "openvino_model.xml"
        file.write_text(re.sub("sentence_embedding ?, ?|, ?sentence_embedding", "", file.read_text()))
        with pytest.raises(ExportError, match=r"states of tokens.*pooled=True"):
            Embedder(copied)

    def test_labels_that_are_not_named(self, labelled: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(labelled, tmp_path / "out"))
        rewritten(folder, "config.json", id2label={"0": "a", "1": "b"})
        with pytest.raises(ExportError, match=r"puts out 3 numbers a text, and config.json names 2 labels"):
            Embedder(folder)
        rewritten(folder, "config.json", id2label={"0": "a", "2": "b"})
        with pytest.raises(ExportError, match="does not name the labels"):
            Embedder(folder)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"cpus": 0}, "cpus must be a whole number of at least 1, not 0"),
            ({"tokens": 2.5}, "tokens must be a whole number"),
            ({"precision": "int4"}, "precision='int4' is not known; choose one of f32, bf16, f16"),
            ({"max_length": 65}, "max_length=65 is more than the 64 tokens"),
            ({"config": {"NO_SUCH": 1}}, "OpenVINO does not take config: .*NO_SUCH"),
        ],
    )
    def test_options(self, folder: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(OptionError, match=said):
            Embedder(folder, **options)

    def test_one_text_alone(self, folder: Path) -> None:
        with pytest.raises(OptionError, match=r"Texts are given as a list"):
            Embedder(folder)("one text")


def test_workers_need_no_torch(folder: Path) -> None:
    code = f"import sys; from prunepass.bulk import Embedder; print(Embedder({str(folder)!r})(['a cat']).shape); "
    code += "print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["(1, 32)", "[]"]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_container(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (8 if limit is None else limit)


def test_messages_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(ExportError) as e:
        Embedder(tmp_path)
    assert re.fullmatch(r"[^\n]+", str(e.value))
