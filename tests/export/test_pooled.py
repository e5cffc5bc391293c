"""Folders of one vector a text: against pruning and pooling outside, and read by the servers that are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import POSITIONS, bert, text
from torch import Tensor

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError
from prunepass.export.pooling import Pooling, pooled_program, read_pooling
from prunepass.graph.capture import capture_exported, capture_module
from prunepass.passes.pool import PoolKept
from prunepass.pipeline import prune_graph
from vocabulary import save_model, tiny_tokenizer
from zoo import tiny

FULL = {"INFERENCE_PRECISION_HINT": "f32"}
TEXTS = ("the cat sat on the mat", "good film", "who sat where ? the bad cat sat on the good mat . " * 5)


def pooled(hidden: Tensor, mask: Tensor, mode: str, normalize: bool = True) -> Tensor:
    """[B, D] by the definition, row by row."""
    rows = [states[live != 0] for states, live in zip(hidden, mask, strict=True)]
    vectors = torch.stack([{"mean": row.mean(0), "cls": row[0], "last": row[-1]}[mode] for row in rows])
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def plan_of(restore: Any) -> PrunePlan:
    return PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], scorer="norm", restore=restore)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PrunePlan]:
    """A folder as sentence-transformers writes it, what was exported from it, and the plan."""
    from transformers import AutoModel

    source = save_model(tmp_path_factory.mktemp("model"), head="base")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    plan = plan_of("mean")
    model = AutoModel.from_pretrained(source).eval()
    out = tmp_path_factory.mktemp("out") / "served"
    return source, prunepass.export(model, plan, out, tokenizer=tiny_tokenizer(), pooled=True), plan


def expected(source: Path, plan: PrunePlan, length: int) -> Tensor:
    """Each text by itself, cut to ``length`` tokens, through `prune` and pooled outside."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source).eval()
    rows = [tiny_tokenizer()(one, truncation=True, max_length=length, return_tensors="pt") for one in TEXTS]
    pruned = prunepass.prune(model, plan, dict(rows[0]))
    with torch.no_grad():
        return torch.cat([pooled(pruned(**row).last_hidden_state, row["attention_mask"], "mean") for row in rows])


def test_genai_embeds_the_same_vectors(embedder: tuple[Path, Path, PrunePlan]) -> None:
    genai = pytest.importorskip("openvino_genai")
    source, folder, plan = embedder
    pipeline = genai.TextEmbeddingPipeline(str(folder), "CPU", **FULL)  # pools by the first token, its default
    found = torch.tensor(pipeline.embed_documents(list(TEXTS)))
    assert (found - expected(source, plan, 24)).abs().max() < 1e-4


def test_files_for_sentence_transformers(embedder: tuple[Path, Path, PrunePlan]) -> None:
    _, folder, _ = embedder
    modules = json.loads((folder / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling"]
    pooling = json.loads((folder / modules[1]["path"] / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == json.loads((folder / "config.json").read_text())["hidden_size"]
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_cls_token"]
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    assert (folder / "config_sentence_transformers.json").is_file()


def test_the_file_has_one_output_by_both_names(embedder: tuple[Path, Path, PrunePlan]) -> None:
    openvino = pytest.importorskip("openvino")
    _, folder, _ = embedder
    (port,) = openvino.Core().read_model(folder / "openvino_model.xml").outputs
    assert set(port.names) == {"sentence_embedding", "last_hidden_state"}
    assert port.get_element_type() == openvino.Type.f32
    assert port.get_partial_shape()[1] == 1


def test_onnx_vectors_keep_what_the_plan_restores(tmp_path: Path) -> None:
    """A mean over last states is another than the mean of the tokens kept."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, plan, inputs = bert(), plan_of("last"), text(3, 20)
    folder = prunepass.export(model, plan, tmp_path / "out", to="onnx", pooled=True, pooling="mean", normalize=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [port.name for port in session.get_outputs()] == ["sentence_embedding", "last_hidden_state"]
    given = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    vector, token = session.run(None, {port.name: given[port.name].numpy() for port in session.get_inputs()})
    with torch.no_grad():
        hidden = prunepass.prune(model, plan, inputs)(**inputs).last_hidden_state
    exact = pooled(hidden, inputs["attention_mask"], "mean", normalize=False)
    assert vector.shape == exact.shape
    assert (torch.from_numpy(vector) - exact).abs().max() < 1e-4
    assert (token[:, 0] == vector).all()


@pytest.mark.parametrize(
    ("kind", "restore", "mode", "side"),
    [
        ("modernbert", "mean", "mean", None),
        ("bert", "zeros", "mean", None),
        ("bert", "mean", "last", None),
        ("bert", "mean", "cls", "right"),
        ("bert", "last", "cls", None),
    ],
)
def test_programs_pool_as_outside(kind: str, restore: str, mode: str, side: str | None) -> None:
    model: Any = tiny(kind, dtype=torch.float32)
    plan, inputs = plan_of(restore), text(3, 20)
    inputs["attention_mask"][1, : 0 if side else 4] = 0  # padded on the other side
    program = pooled_program(capture_module(model, inputs).exported, Pooling(mode, True, side), "Model")
    captured = capture_exported(program)
    result = prune_graph(captured.graph_module, plan, copy=False, metadata=False, before_restore=(PoolKept(),))
    nothing_to_restore = (mode, restore) == ("mean", "mean") or side is not None
    assert result.changes.get("pool", 0) == (mode == restore == "mean")
    assert result.restored != nothing_to_restore
    with torch.no_grad():
        found = result.graph_module(**inputs)
        hidden = prunepass.prune(model, plan, inputs)(**inputs).last_hidden_state
    assert tuple(found) == ("sentence_embedding",)
    assert found["sentence_embedding"].dtype == torch.float32
    assert (found["sentence_embedding"] - pooled(hidden, inputs["attention_mask"], mode)).abs().max() < 1e-5


def test_genai_reranks_by_the_same_scores(tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai")
    from transformers import AutoModelForSequenceClassification

    source = save_model(tmp_path / "model", labels=("score",))
    model: Any = AutoModelForSequenceClassification.from_pretrained(source).eval()
    assert model.config.num_labels == 1
    tokenizer, plan, query = tiny_tokenizer(), PrunePlan([Stage(1, 0.6)], scorer="norm"), "who sat where ?"
    folder = prunepass.export(model, plan, tmp_path / "out", tokenizer=tokenizer)
    pipeline = genai.TextRerankPipeline(str(folder), "CPU", top_n=len(TEXTS), **FULL)
    found = dict(pipeline.rerank(query, list(TEXTS)))
    limit = {"truncation": True, "max_length": POSITIONS, "return_tensors": "pt"}
    rows = [dict(tokenizer(query, one, **limit)) for one in TEXTS]
    pruned = prunepass.prune(model, plan, rows[0])
    with torch.no_grad():
        exact = [float(pruned(**row).logits.sigmoid()) for row in rows]
    assert [found[i] for i in range(len(TEXTS))] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pooled": True}, "How to pool is not known"),
        ({"pooled": True, "pooling": "median"}, "choose one of mean, cls, last"),
        ({"pooling": "mean"}, "goes with pooled=True"),
        ({"normalize": False}, "goes with pooled=True"),
        ({"pooled": True, "pooling": "mean", "stateful": True}, "Leave one of them out"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=says):
        prunepass.export(bert(), None, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_nothing_to_pool(tmp_path: Path) -> None:
    model = tiny("bert", "sequence", dtype=torch.float32)
    with pytest.raises(OptionError, match=r"BertForSequenceClassification puts out logits.*AutoModel"):
        prunepass.export(model, None, tmp_path / "out", pooled=True, pooling="mean")


@pytest.mark.parametrize(
    ("modules", "config", "says"),
    [
        (("Transformer", "Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, "has Dense besides"),
        (("Transformer",), {}, "has no Pooling"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "by max_tokens"),
        (("Transformer", "Pooling"), {"pooling_mode": ["mean", "cls"]}, "by mean and cls"),
        (("Transformer", "Pooling"), {"pooling_mode": "mean", "include_prompt": False}, "the prompt's tokens"),
    ],
)
def test_poolings_that_are_not_written(modules: Any, config: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": m, "type": f"models.{m}"} for m in modules]))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match=says):
        read_pooling(tmp_path, None, None)
    assert read_pooling(tmp_path, "cls", None) == ("cls", False)  # what is given goes before the file


def test_both_ways_of_writing_a_pooling_are_read(tmp_path: Path) -> None:
    kinds = ("Transformer", "Pooling", "Normalize")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": m, "type": f"models.{m}"} for m in kinds]))
    (tmp_path / "Pooling").mkdir()
    for config, mode in (({"pooling_mode": "lasttoken"}, "last"), ({"pooling_mode_cls_token": True}, "cls")):
        (tmp_path / "Pooling" / "config.json").write_text(json.dumps(config))
        assert read_pooling(tmp_path, None, None) == (mode, True)
    assert read_pooling(tmp_path, None, False) == ("cls", False)
