"""Training on folders of sound: what is read, refused and left out; waveforms, spectrograms, embeddings and classes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

soundfile = pytest.importorskip("soundfile")

import prunepass
from prunepass import PrunePlan
from prunepass.cost.blocks import BlockCosts
from prunepass.errors import DataError, MissingExtraError, OptionError
from prunepass.export.hub import load
from prunepass.graph.capture import capture_module
from prunepass.training.data.heads import Classification, MediaEmbedding, head_of
from prunepass.training.data.media import MediaCollator, Tokens, tokens_of
from prunepass.training.data.options import Goal, SearchOptions, Source, TrainOptions
from prunepass.training.data.sounds import Reader, build_sounds, load_sounds
from prunepass.training.loop import recipe
from prunepass.training.loop.config import PruneConfig
from prunepass.training.loop.prepare import prepare_search, prepare_training
from prunepass.training.loop.trainer import PruneTrainer

RATE = 16_000
PITCHES = {"high": 3000.0, "low": 500.0}
LABELS: dict[str, Any] = {"id2label": {0: "high", 1: "low"}, "label2id": {"high": 0, "low": 1}}
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
#: about 39 frames of 400 samples
WAVES: dict[str, Any] = LAYERS | {
    "conv_dim": [16, 12],
    "conv_stride": [20, 4],
    "conv_kernel": [40, 6],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
MELS = 16
SPECTROGRAM: dict[str, Any] = LAYERS | {
    "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 32, "num_mel_bins": MELS,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "num_mel_bins": MELS,
    "max_source_positions": 50,  # of one second
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def frames(samples: int) -> int:
    """By the kernels and strides of `WAVES`."""
    return ((samples - 40) // 20 + 1 - 6) // 4 + 1


def tone(pitch: float, seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """Two channels of a tone under noise."""
    chance = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    clean = 0.4 * np.sin(2 * np.pi * pitch * times + chance.uniform(0, 6))
    return np.stack([clean, clean], 1) + 0.05 * chance.standard_normal((len(times), 2))


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of twelve clips of .1 to .29 seconds."""
    folder = tmp_path_factory.mktemp("tones")
    for name, pitch in PITCHES.items():
        (folder / name).mkdir()
        for i in range(12):
            seconds = 0.1 + 0.19 * ((5 * i) % 12) / 11
            soundfile.write(folder / name / f"{i:02}.wav", tone(pitch, seconds, i + 100 * (name == "low")), RATE)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model
    stable = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    made: dict[str, tuple[Any, Any]] = {
        "masked": (
            transformers.AutoModel.from_config(config("wavlm", **WAVES, **stable)),
            transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True),
        ),
        "masked-classifier": (
            transformers.AutoModelForAudioClassification.from_config(config("wav2vec2", **WAVES, **stable, **LABELS)),
            transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True),
        ),
        "unmasked-classifier": (
            transformers.AutoModelForAudioClassification.from_config(config("hubert", **WAVES, **LABELS)),
            transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=False),
        ),
        "ast-classifier": (
            transformers.AutoModelForAudioClassification.from_config(
                config("audio-spectrogram-transformer", **SPECTROGRAM, **LABELS)
            ),
            transformers.ASTFeatureExtractor(num_mel_bins=MELS, max_length=32),
        ),
        "whisper-classifier": (
            transformers.AutoModelForAudioClassification.from_config(config("whisper", **WHISPER, **LABELS)),
            transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=1),
        ),
        "whisper": (
            transformers.WhisperForConditionalGeneration(config("whisper", **WHISPER)),
            transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=1),
        ),
    }
    for name, (model, extractor) in made.items():
        model.save_pretrained(folder / name)
        extractor.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def options(model: str, data: Path, out: Path, **more: Any) -> TrainOptions:
    return TrainOptions(model, Source(str(data)), out, Goal(share=0.7), **({"epochs": 1.0, "batch_size": 8} | more))


#: the most tokens of a clip: of .29 seconds, of .32 that AST's frames span, of Whisper's one second
LONGEST = {
    "masked": frames(round(0.29 * RATE)),
    "masked-classifier": frames(round(0.29 * RATE)),
    "unmasked-classifier": frames(round(0.29 * RATE)),
    "ast-classifier": 34,
    "whisper-classifier": 50,
    "whisper": 50,
}


@pytest.mark.parametrize("name", LONGEST)
def test_train_writes_a_model_with_a_plan(name: str, models: dict[str, str], tones: Path, tmp_path: Path) -> None:
    # sdtp has no search, which traces each plan that it tries: once is enough for a quick test
    asked = options(models[name], tones, tmp_path / "out", method="both" if name == "whisper" else "sdtp")
    ready = prepare_training(asked)
    assert ready.length == LONGEST[name]
    assert (len(set(ready.train.lengths)) > 1) == name.startswith("masked")
    outcome = recipe.train(asked, ready)
    assert outcome.plan.stages
    # the budget is met over the clips to train on; held-out ones of other lengths cost another share
    assert outcome.cost_share <= (0.8 if name.startswith("masked") else 0.7)
    assert outcome.plan.protect.first == (2 if name.startswith("ast") else 1)
    assert ("accuracy" in outcome.pruned) == name.endswith("classifier")
    outcome.save_pretrained(tmp_path / "saved")
    found = load(str(tmp_path / "saved"), media=True)
    assert type(found.model) is type(outcome.model)
    assert found.tokenizer.to_dict() == ready.loaded.tokenizer.to_dict()
    inputs = ready.head.model_inputs(ready.collator([ready.train[i] for i in range(2)]))
    plan = PrunePlan.from_pretrained(tmp_path / "saved")
    assert plan.stages == outcome.plan.stages
    pruned, masked = (prunepass.prune(found.model, plan, inputs, mode=mode) for mode in ("gather", "mask"))
    with torch.no_grad():
        one, other = (model(**inputs)[0] for model in (pruned, masked))
    assert one.shape[0] == 2
    if name.endswith("classifier"):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_pruned_classifier_keeps_the_answers_of_its_teacher(
    models: dict[str, str], tones: Path, tmp_path: Path
) -> None:
    """Tones of two pitches, which the unpruned model is taught first."""
    loaded = load(models["masked-classifier"], media=True)
    head = head_of(loaded.model)
    (rows,), tokens = build_sounds(
        loaded.model, "input_values", loaded.tokenizer, [load_sounds(Source(str(tones)), head)]
    )
    batch = MediaCollator(tokens)([rows[i] for i in range(len(rows))])
    learning = torch.optim.AdamW(loaded.model.parameters(), 3e-3)
    for _ in range(25):
        loss = head.task_loss(loaded.model(**head.model_inputs(batch)), batch)
        learning.zero_grad(), loss.backward(), learning.step()
    taught = tmp_path / "taught"
    loaded.model.save_pretrained(taught), loaded.tokenizer.save_pretrained(taught)
    held_out = tmp_path / "held-out"
    for name, pitch in PITCHES.items():
        (held_out / name).mkdir(parents=True)
        for i in range(8):
            soundfile.write(held_out / name / f"{i}.wav", tone(pitch, 0.2, 1000 + i), RATE)
    asked = options(str(taught), tones, tmp_path / "out", method="sdtp", epochs=4.0, eval_data=Source(str(held_out)))
    outcome = recipe.train(asked, prepare_training(asked))
    assert outcome.plan.stages
    assert outcome.dense["accuracy"] == 1.0
    assert outcome.pruned["accuracy"] >= 15 / 16


def test_padding_changes_no_answer_and_no_distance(models: dict[str, str], tones: Path) -> None:
    """A clip alone, and beside a longer one, whose batch says which samples and which tokens are live."""
    loaded = load(models["masked"], media=True)
    model, head = loaded.model.double(), head_of(loaded.model)
    assert isinstance(head, MediaEmbedding)
    (rows,), tokens = build_sounds(model, "input_values", loaded.tokenizer, [load_sounds(Source(str(tones)), head)])
    order = sorted(range(len(rows)), key=rows.lengths.__getitem__)
    collate = MediaCollator(tokens)
    alone, both = ({**collate([rows[i] for i in chosen])} for chosen in (order[:1], [order[0], order[-1]]))
    for batch in (alone, both):
        batch["input_values"] = batch["input_values"].double()
    assert both["attention_mask"].sum(1).tolist() == [rows.lengths[order[0]], rows.lengths[order[-1]]]
    assert both["sample_mask"].shape == both["input_values"].shape
    assert set(head.model_inputs(both)) == {"input_values", "attention_mask"}
    with torch.no_grad():
        one, other = (model(**head.model_inputs(batch)) for batch in (alone, both))
    live = rows.lengths[order[0]]
    torch.testing.assert_close(other.last_hidden_state[:1, :live], one.last_hidden_state[:, :live], atol=1e-6, rtol=0)
    noisy = {"last_hidden_state": other.last_hidden_state.clone()}
    noisy["last_hidden_state"][0, live:] += 9.0
    assert float(head.divergence(noisy, other, both).max()) < 1e-9, "what lies behind a clip does not count"


def test_a_trainer_takes_rows_of_samples(models: dict[str, str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1600 + 100 * (i % 5) for i in range(16)]
    rows = [
        {"input_values": torch.randn(n, generator=generator), "attention_mask": torch.ones(n), "labels": i % 2}
        for i, n in enumerate(lengths)
    ]
    model = transformers.AutoModelForAudioClassification.from_pretrained(models["masked-classifier"])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to="none", use_cpu=True
    )
    trainer = PruneTrainer(model, PruneConfig(Goal(share=0.6), method="sdtp"), arguments, train_dataset=rows)
    trainer.train()
    assert trainer.plan is not None
    assert trainer.plan.stages


def test_rows_that_a_trainer_cannot_take_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    rows = [{"input_values": torch.zeros(1600 + 100 * (i % 5)), "labels": i % 2} for i in range(16)]
    model = transformers.AutoModelForAudioClassification.from_pretrained(models["masked-classifier"])
    config = PruneConfig(Goal(share=0.6), method="sdtp")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(DataError, match="reads sound: each row needs input_values"):
        PruneTrainer(model, config, arguments, train_dataset=[{"labels": 0}] * 9)
    with pytest.raises(DataError, match=r"several sizes.*attention_mask of ones"):
        PruneTrainer(model, config, arguments, train_dataset=rows)


def test_costs_of_a_sound_are_those_of_its_frames(models: dict[str, str]) -> None:
    """Of a waveform of any length, as functions of its tokens and not of its samples."""
    model = load(models["masked-classifier"], media=True).model
    inputs = {"input_values": torch.zeros(2, 4000), "attention_mask": torch.ones(2, 4000, dtype=torch.int64)}
    costs = BlockCosts.of(capture_module(model, inputs), scorer="attention")
    counts = torch.tensor([5.0, 20.0, 300.0], dtype=torch.float64)
    width, inner = 32, 40
    # four products with matrices of the width, two with those between it and the MLP's, two of tokens with tokens
    expected = counts * 2 * width * (4 * width + 2 * inner) + 4 * counts**2 * width
    for block in range(3):
        torch.testing.assert_close(costs.at(block, counts), expected)
    torch.testing.assert_close(costs.stage(counts), 2 * counts**2 * width)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [8000, 16000, 44100, 48000])
def test_a_clip_is_resampled_and_its_channels_averaged(own: int, tmp_path: Path) -> None:
    """A tone of any rate comes out as the tone at the model's rate, cut to the asked length."""
    times = np.arange(own) / own
    left = np.sin(2 * np.pi * 1000 * times)
    soundfile.write(tmp_path / "clip.flac", np.stack([0.5 * left, 0.25 * left], 1), own)
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    reader = Reader(extractor, "input_values", limit=RATE // 2)
    assert reader.samples(tmp_path / "clip.flac") == RATE
    heard = reader.read(tmp_path / "clip.flac")["input_values"]
    assert heard.shape == (RATE // 2,)
    expected = 0.375 * torch.sin(2 * torch.pi * 1000 * torch.arange(RATE // 2) / RATE)
    inner = slice(400, -400)  # filters ring at the ends
    torch.testing.assert_close(heard[inner], expected[inner], atol=4e-3, rtol=0)


def test_aliases_are_filtered_out(tmp_path: Path) -> None:
    """A tone above half of the model's rate is silence, and not another tone."""
    soundfile.write(tmp_path / "clip.wav", np.sin(2 * np.pi * 11000 * np.arange(48000) / 48000), 48000)
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    heard = Reader(extractor, "input_values", limit=RATE).read(tmp_path / "clip.wav")["input_values"]
    assert float(heard[400:-400].abs().max()) < 0.01


def test_without_a_mask_all_clips_get_one_length(models: dict[str, str], tones: Path) -> None:
    loaded = load(models["unmasked-classifier"], media=True)
    examples = load_sounds(Source(str(tones)), head_of(loaded.model))
    (rows,), tokens = build_sounds(loaded.model, "input_values", loaded.tokenizer, [examples], 0.2)
    assert {tuple(rows[i]["input_values"].shape) for i in range(len(rows))} == {(3200,)}
    assert rows.lengths == [frames(3200)] * 24
    assert rows.cut == sum(soundfile.info(str(row.text)).frames > 3200 for row in examples) > 0
    batch = MediaCollator(tokens)([rows[0], rows[1]])
    assert "sample_mask" not in batch
    assert batch["attention_mask"].shape == (2, frames(3200))


def test_what_is_cut_or_too_short_is_counted(
    models: dict[str, str], tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(models["masked"], media=True)
    for i, seconds in enumerate((0.3, 0.2, 0.001)):
        soundfile.write(tmp_path / f"{i}.wav", tone(500, seconds, i), RATE)
    (tmp_path / "notes.txt").write_text("no sound")
    (tmp_path / "broken.wav").write_text("no sound either")
    with caplog.at_level(logging.WARNING):
        examples = load_sounds(Source(str(tmp_path)), head_of(loaded.model))
        (rows,), _ = build_sounds(loaded.model, "input_values", loaded.tokenizer, [examples], 0.25)
    assert rows.lengths == [frames(4000), frames(3200)]
    for said in ("notes.txt", "1 sound files", "broken.wav", "1 sound files in", "too short", "1 of the 2 sound files"):
        assert said in caplog.text
    (tmp_path / "0.wav").write_text("overwritten since")
    with pytest.raises(DataError, match=r"0\.wav cannot be read"):
        rows[0]
    soundfile.write(tmp_path / "1.wav", np.full(3200, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=r"1\.wav holds values that are no numbers"):
        rows[1]


def test_labels_are_names_of_folders(models: dict[str, str], tones: Path, tmp_path: Path) -> None:
    head = head_of(load(models["ast-classifier"], media=True).model)
    assert isinstance(head, Classification)
    found = load_sounds(Source(str(tones)), head)
    assert {(Path(str(row.text)).parent.name, row.label) for row in found} == {("high", 0), ("low", 1)}
    soundfile.write(tmp_path / "b.wav", tone(500, 0.2, 0), RATE)
    assert not load_sounds(Source(str(tmp_path)), head).labelled
    (tmp_path / "low").mkdir()
    soundfile.write(tmp_path / "low" / "a.wav", tone(500, 0.2, 0), RATE)
    with pytest.raises(DataError, match=r"1 of the 2 sound files in .* lie in no folder"):
        load_sounds(Source(str(tmp_path)), head)


def test_what_does_not_fit_is_refused(models: dict[str, str], tones: Path, tmp_path: Path) -> None:
    model, out = models["masked"], tmp_path / "out"
    with pytest.raises(DataError, match=r"reads sound files: give a folder of them.*is not there"):
        prepare_training(options(model, tmp_path / "nowhere", out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no sound file that can be read"):
        prepare_training(options(model, tmp_path / "empty", out))
    with pytest.raises(OptionError, match=r"reads sound files, and .*max_length are for texts"):
        prepare_training(options(model, tones, out, max_length=64))
    with pytest.raises(OptionError, match=r"max_seconds must be at least 0\.1, not 0\.001"):
        prepare_training(options(model, tones, out, max_seconds=0.001))
    with pytest.raises(OptionError, match="takes 1 seconds at most; max_seconds asks for 2"):
        prepare_training(options(models["whisper"], tones, out, max_seconds=2.0))
    with pytest.raises(OptionError, match="reads sound, and this command takes texts"):
        prepare_search(SearchOptions(model, Source(str(tones)), out, Goal(share=0.5)))
    with pytest.raises(OptionError, match="encoder alone"):
        head_of(transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)))


def test_seconds_are_for_sound_alone(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    folder = tmp_path / "texts"
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    with pytest.raises(OptionError, match="reads texts, and max_seconds is for sound"):
        prepare_training(options(str(folder), tmp_path / "x.csv", tmp_path / "out", max_seconds=3.0))


def test_frames_that_no_convolution_explains_are_refused() -> None:
    config = transformers.AutoConfig.for_model(
        "wav2vec2", **WAVES, feat_extract_norm="layer", add_adapter=True, num_adapter_layers=1, output_hidden_size=32
    )
    with pytest.raises(OptionError, match="adapter"):
        tokens_of(transformers.AutoModel.from_config(config).eval(), "input_values", torch.zeros(4000))


def test_spectrograms_of_several_sizes_are_refused() -> None:
    rows = [{"input_features": torch.zeros(MELS, n)} for n in (60, 80)]
    with pytest.raises(DataError, match="input_features of one batch are of several sizes"):
        MediaCollator(Tokens("input_features", 30))(rows)


def test_a_missing_reader_is_named(models: dict[str, str], tones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(load(models["masked"], media=True).model)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=r'soundfile.*pip install "prunepass\[audio\]"'):
        load_sounds(Source(str(tones)), head)
