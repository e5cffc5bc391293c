"""``prunepass train`` and ``prunepass search`` from a file to a folder that prunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

import prunepass
from prunepass import PrunePlan
from prunepass.cli.app import app
from prunepass.cost.latency import Conditions, LatencyTable
from prunepass.training.data.heads import head_of
from prunepass.training.loop.recipe import leaving, restore_for
from vocabulary import save_model, tiny_tokenizer
from zoo import tiny

WORDS = ("the", "cat", "sat", "on", "mat", "good", "bad", "film", "who", "where")


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "classifier"))


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = torch.Generator().manual_seed(0)
    lines = ["text,label"]
    for _ in range(60):
        count = int(torch.randint(8, 30, (1,), generator=generator))
        words = [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist()]
        lines.append(f"{' '.join(words)},{'good' if 'good' in words[:4] else 'bad'}")
    path = tmp_path_factory.mktemp("data") / "data.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def call(*args: str) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def inputs() -> dict[str, torch.Tensor]:
    texts = ["the cat sat on the mat who where film good bad the cat", "good film the cat sat on the mat"]
    return dict(tiny_tokenizer()(texts, padding=True, return_tensors="pt"))


@pytest.mark.slow
def test_train_then_search_with_its_predictors(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    figures = call("train", model, data, "--budget", "0.5", "-o", str(out), "--epochs", "1", "--batch-size", "8")
    assert 0.3 < figures["cost_share"] <= 0.52  # of the texts held out; the budget is for those trained on
    assert {"loss", "accuracy"} <= figures["pruned"].keys() & figures["dense"].keys()
    assert figures["versions"]["torch"]
    run = json.loads((out / "prunepass_run.json").read_text())
    assert run["options"]["epochs"] == 1
    assert run["options"]["learning_rate"] == 5e-5
    assert (run["data"]["train"]["rows"], run["data"]["eval"]["rows"], run["rows"]) == (54, 6, 6)
    assert run["data"]["train"]["columns"] == {"text": "text", "label": "label"}
    assert run["truncated"].keys() == run["dense"].keys()
    low, high = run["intervals"]["pruned"]["accuracy"]
    assert low <= run["pruned"]["accuracy"] <= high
    assert not (tmp_path / "trained.checkpoints").exists()
    trained = AutoModelForSequenceClassification.from_pretrained(out).eval()
    original = AutoModelForSequenceClassification.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), original.parameters(), strict=True))
    with torch.no_grad():
        pruned = prunepass.prune(trained, str(out), inputs())
        assert pruned(**inputs()).logits.shape == (2, 2)
    assert not list(tmp_path.glob(".trained-*")), "no work folder is left"
    predictors = PrunePlan.from_pretrained(out / "predictors")
    assert [s.layer for s in predictors.stages] == [0, 1, 2, 3]

    found = tmp_path / "found"
    options = ["--plan", str(out / "predictors"), "--rows", "24", "--max-evaluations", "30"]
    figures = call("search", str(out), data, "--budget", "0.4", "-o", str(found), *options)
    assert figures["cost_share"] <= 0.4
    plan = PrunePlan.from_pretrained(found)
    for i, stage in enumerate(plan.stages):
        own, given = plan.weights_of(i), predictors.weights_of(stage.layer)
        assert all(torch.equal(own[k], given[k]) for k in given)
    assert figures["dense"]["divergence"] == 0
    assert figures["pruned"]["divergence"] > 0
    assert figures["truncated"]["divergence"] > 0
    assert figures["rows"] == 24


def test_search_by_measured_latency_needs_no_predictors(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "encoder", head="base")
    asked = {}

    def measure(model: Any, example: Any, **options: Any) -> LatencyTable:
        asked.update(options)  # a tiny model is too fast to be measured, let alone to be made faster
        lengths = (8, 16, 64)
        blocks = tuple(tuple(1e-3 * n for n in lengths) for _ in range(4))
        conditions = Conditions("tiny", "eager", "f32", "auto", 1, 1, {}, "norm", None, 1, {}, "")
        return LatencyTable(lengths, blocks, (1e-3,) * 3, (1e-4,) * 3, conditions)

    monkeypatch.setattr(LatencyTable, "measure", measure)
    options = ["--scorer", "norm", "--rows", "16", "--max-evaluations", "26", "--target", "eager", "--leave", "drop"]
    figures = call("search", str(model), data, "--latency-ms", "40", "-o", str(tmp_path / "plan"), *options)
    assert asked["target"] == "eager"
    assert asked["leave"] == "drop"
    assert asked["scorer"] == "norm"
    found = figures["searches"][0]
    assert found["unit"] == "s"
    assert 0.035 < found["cost"] <= 0.04
    plan = PrunePlan.from_pretrained(tmp_path / "plan")
    assert plan.restore == "lens", "an embedding is a mean over tokens"
    assert all(set(plan.lens_of(i)) == {"down.weight", "up.weight", "up.bias"} for i in range(len(plan.stages)))
    assert asked["lens"] == plan.lens_of(0)["down.weight"].shape[0]
    pruned = prunepass.prune(AutoModel.from_pretrained(model).eval(), plan, inputs())
    assert pruned(**inputs()).last_hidden_state.shape[1] == inputs()["input_ids"].shape[1]


def test_a_budget_that_cannot_be_met_names_the_lowest_that_can(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["search", model, data, "--budget", "0.02", "--scorer", "attention", "-o", str(out), "--rows", "8"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "cannot be met" in result.stderr.replace("\n", " ")
    assert "lowest is" in result.stderr.replace("\n", " ")
    assert not out.exists()


def test_a_search_merges_embeddings_and_drops_others() -> None:
    embeds, classifies = (head_of(tiny("bert", head)) for head in ("base", "sequence"))
    assert [leaving(None, head) for head in (embeds, classifies)] == ["merge", "drop"]
    assert [leaving("drop", embeds), leaving("merge", classifies)] == ["drop", "merge"]
    assert leaving(None, embeds, PrunePlan((), "mlp")) == "drop", "with trained predictors that is as good"
    assert restore_for(embeds, lens=True, leave="merge") == "last"
