"""Training on folders of images: what is read, refused and skipped; embeddings and classifiers through both doors."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    TrainingArguments,
    ViTImageProcessorPil,
)

import prunepass
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.cost.blocks import BlockCosts
from prunepass.errors import DataError, OptionError
from prunepass.export.hub import load
from prunepass.graph.capture import capture_module
from prunepass.training.data.heads import Classification, MediaEmbedding, head_of
from prunepass.training.data.images import Images, load_images
from prunepass.training.data.media import MediaCollator, Tokens, tokens_of
from prunepass.training.data.options import Goal, SearchOptions, Source, TrainOptions
from prunepass.training.loop import recipe
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.prepare import prepare_search, prepare_training
from prunepass.training.loop.trainer import PruneTrainer

SIZE, TOKENS = 24, 37
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": SIZE,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of twelve, red and blue, each with noise of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir()
        for i in range(12):
            values = torch.randint(0, 90, (30, 40, 3), generator=generator, dtype=torch.uint8)
            values[..., channel] += 150
            Image.fromarray(values.numpy()).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    labels = {"id2label": {0: "blue", 1: "red"}, "label2id": {"blue": 0, "red": 1}}
    made = {
        "embedding": AutoModel.from_config(AutoConfig.for_model("dinov2", **TINY)),
        "classifier": AutoModelForImageClassification.from_config(AutoConfig.for_model("vit", **TINY, **labels)),
    }
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    for name, model in made.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("name", ["embedding", "classifier"])
def test_train_writes_a_model_with_a_plan(name: str, models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    options = TrainOptions(
        str(models[name]),
        Source(str(pictures)),
        tmp_path / "out",
        Goal(share=0.7),
        method="both" if name == "embedding" else "sdtp",  # which has nothing to search for
        epochs=1.0,
        batch_size=8,
    )
    ready = prepare_training(options)
    assert ready.length == TOKENS
    assert ready.train.lengths == [TOKENS] * len(ready.train)
    outcome = recipe.train(options, ready)
    assert outcome.plan.stages
    assert outcome.cost_share <= 0.7
    assert outcome.plan.protect.first == 1
    assert ("accuracy" in outcome.pruned) == (name == "classifier")
    outcome.save_pretrained(tmp_path / "saved")
    assert PrunePlan.from_pretrained(tmp_path / "saved").stages == outcome.plan.stages
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())["size"]["height"] == SIZE


def test_a_trainer_takes_rows_of_pixels(models: dict[str, Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [{"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator), "labels": i % 2} for i in range(16)]
    model = AutoModelForImageClassification.from_pretrained(models["classifier"])
    config = PruneConfig(Goal(share=0.6), method="sdtp", protect=Protect(first=0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to="none", use_cpu=True
    )
    trainer = PruneTrainer(model, config, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.plan is not None
    assert trainer.plan.stages
    assert trainer.plan.protect.first == 1, "the class token stays"
    with pytest.raises(DataError, match="pixel_values"):
        PruneTrainer(model, config, arguments, train_dataset=[{"labels": 0}] * 9)


def test_a_fixed_plan_of_a_scorer_without_weights_is_adapted_to_as_it_stands(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """ToMe's place and matching: tokens merge behind the attention of each block, the first among them."""
    rows = [{"pixel_values": torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i))} for i in range(96)]
    shares = (Fraction(TOKENS - 9 * (i + 1), TOKENS) for i in range(3))
    stages = tuple(Stage(i, keep, after_attention=True, leave="merge") for i, keep in enumerate(shares))
    scorer = {"name": "likeness", "by": "keys", "sets": "two"}
    plan = PrunePlan(stages, ScorerSpec.of(scorer), restore="last")
    model = AutoModel.from_pretrained(models["embedding"]).eval()
    images = torch.stack([row["pixel_values"] for row in rows[:8]])

    def mean(module: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = module(pixel_values=images).last_hidden_state.mean(1)
        return found

    dense, before = mean(model), mean(prunepass.prune(model, plan, {"pixel_values": images}))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=16, learning_rate=1e-3, report_to="none"
    )
    config = PruneConfig(Goal(share=0.5), method="top", plan=plan, hidden_weight=3.0)
    trainer = PruneTrainer(model, config, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.plan is not None
    assert trainer.plan.stages == stages
    assert trainer.plan.scorer == plan.scorer
    after = mean(prunepass.prune(model.eval(), trainer.plan, {"pixel_values": images}))
    distances = [float((1 - torch.cosine_similarity(x, dense)).mean()) for x in (before, after)]
    assert distances[1] < 0.7 * distances[0]
    trainer.student.eval()
    evaluated = trainer.student(**trainer.data_collator(rows[:8]))["last_hidden_state"].mean(1)
    torch.testing.assert_close(evaluated, after, rtol=0, atol=1e-5)


def test_costs_of_an_image_model_are_those_of_fewer_tokens(models: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(models["embedding"]).eval()
    costs = BlockCosts.of(capture_module(model, {"pixel_values": torch.zeros(2, 3, SIZE, SIZE)}), scorer="attention")
    counts = torch.tensor([5.0, 20.0, 37.0], dtype=torch.float64)
    width, inner = 32, 128  # of DINOv2, whose ratio of the two is 4
    # four products with matrices of the width, two with those between it and the MLP's, two of tokens with tokens
    expected = counts * 2 * width * (4 * width + 2 * inner) + 4 * counts**2 * width
    for block in range(3):
        torch.testing.assert_close(costs.at(block, counts), expected)
    torch.testing.assert_close(costs.stage(counts), 2 * counts**2 * width)


def test_what_is_no_image_is_left_out_and_counted(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, models: dict[str, Path]
) -> None:
    head = head_of(load(str(models["embedding"]), media=True).model)
    assert isinstance(head, MediaEmbedding)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((pictures / "red" / f"{i:02}.png").read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_text("no image either")
    with caplog.at_level(logging.WARNING):
        found = load_images(Source(str(tmp_path)), head)
    assert len(found) == 3
    assert "1 files in" in caplog.text
    assert "notes.txt" in caplog.text
    assert "1 images in" in caplog.text
    assert "broken.jpg" in caplog.text
    cut = tmp_path / "0.png"
    cut.write_bytes(cut.read_bytes()[:900])  # after it was looked at: a disk that filled up, say
    images = Images(found.rows, ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}), TOKENS)
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        images[0]


def test_labels_are_names_of_folders(pictures: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    head = head_of(load(str(models["classifier"]), media=True).model)
    assert isinstance(head, Classification)
    found = load_images(Source(str(pictures)), head)
    assert {(Path(str(row.text)).parent.name, row.label) for row in found} == {("red", 1), ("blue", 0)}
    (tmp_path / "green").mkdir()
    (tmp_path / "green" / "a.png").write_bytes((pictures / "red" / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"'green'.*none of the model's: blue, red"):
        load_images(Source(str(tmp_path)), head)
    (tmp_path / "b.png").write_bytes((pictures / "red" / "00.png").read_bytes())
    with pytest.raises(DataError, match="lie in no folder"):
        load_images(Source(str(tmp_path)), head)


def test_what_is_for_texts_is_refused(pictures: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    model, goal = str(models["embedding"]), Goal(share=0.5)
    with pytest.raises(DataError, match="give a folder of them"):
        prepare_training(TrainOptions(model, Source(str(tmp_path / "nowhere")), tmp_path / "out", goal))
    with pytest.raises(OptionError, match="names of the folders"):
        prepare_training(TrainOptions(model, Source(str(pictures), label="class"), tmp_path / "out", goal))
    with pytest.raises(OptionError, match="are for texts"):
        prepare_training(TrainOptions(model, Source(str(pictures)), tmp_path / "out", goal, max_length=64))
    goal = Goal(latency_ms=5.0, target="openvino")
    with pytest.raises(OptionError, match="counted in FLOPs"):
        prepare_training(TrainOptions(model, Source(str(pictures)), tmp_path / "out", goal))
    with pytest.raises(OptionError, match="reads images, and this command takes texts"):
        prepare_search(SearchOptions(model, Source(str(pictures)), tmp_path / "out", Goal(share=0.5)))


def test_images_of_several_sizes_are_refused() -> None:
    rows = [{"pixel_values": torch.zeros(3, n, 24)} for n in (24, 28)]
    with pytest.raises(DataError, match="several sizes"):
        MediaCollator(Tokens("pixel_values", TOKENS))(rows)


def test_tokens_of_a_pyramid_are_none() -> None:
    config = AutoConfig.for_model("resnet", hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
    with pytest.raises(OptionError, match="no one row of tokens"):
        tokens_of(AutoModel.from_config(config).eval(), "pixel_values", torch.zeros(3, 32, 32))
