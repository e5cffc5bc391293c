"""What the first call costs, dense, pruned, and from the cache on disk: seconds and memory, in fresh processes.

Each is measured in a process of its own, which imports everything before the clock starts. CPU seconds are of all
threads. Memory is how far the most that the process held at any time rose above the most that it held before the call,
where building the model and counting a plan's FLOPs may have been more: take it as a lower bound.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency.models import MODELS, find_model, inputs
from benchmarks.latency.plans import Planner
from benchmarks.latency.targets import TARGETS, How, compile_for, find_target, runtime_state
from benchmarks.markdown import settings, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, option
from prunepass import PrunePlan
from prunepass.errors import OptionError

#: targets whose converted models the package keeps on disk
CACHED = ("openvino-f32", "openvino-bf16", "onnxruntime-f32")
WAYS = ("dense", "pruned", "pruned, filling the cache", "pruned, from the cache")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Call:
    """What is called: one row of ``length`` tokens. ``budget`` is the share of the dense FLOPs; None prunes nothing."""

    model: str
    target: str
    budget: str | None
    length: int = 128
    scorer: str = "norm"
    stages: int = 4
    threads: int = 1


@dataclass(frozen=True)
class Benchmark(Task):
    title = "What the first call costs"
    introduction = (
        "Seconds from the first call's beginning to its end less those of the second: tracing, passes, conversion "
        "and compilation, in a process of its own for each figure. Brackets hold CPU seconds; MiB is how far the "
        "process grew beyond the model."
    )
    models: tuple[str, ...] = option(("minilm-l6", "bert-base"), f"of: {', '.join(MODELS)}")
    targets: tuple[str, ...] = option(("openvino-f32", "onnxruntime-f32", "inductor-f32"), f"of: {', '.join(TARGETS)}")
    length: int = option(128, "tokens of the call")
    budget: str = option("1/2", "share of the dense FLOPs")
    threads: int = option(torch.get_num_threads, "of every runtime", factory=True)

    def cells(self) -> Iterator[Cell]:
        for model, target in product(self.models, self.targets):
            find_model(model)
            call = Call(model, target, self.budget, self.length, threads=self.threads)
            yield Cell(asdict(call), partial(measure, call), why_not=find_target(target).why_not())

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        lines = []
        for group in groups:
            ways = {row["way"]: row for row in group.rows}
            names = [str(group.shared[name]) for name in ("model", "target", "length", "budget")]
            times = [f"{c['seconds']:.1f} ({c['cpu_seconds']:.1f})" if (c := ways.get(way)) else "" for way in WAYS]
            lines.append([*names, *times, " to ".join(str(ways[way]["mebibytes"]) for way in WAYS[:2])])
        yield table(("", "target", "tokens", "budget", *WAYS, "MiB, dense to pruned"), lines)
        yield settings(groups)


def measure(wanted: Call, _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    """A row a way."""
    target = find_target(wanted.target)
    return conditions(*target.packages, threads=wanted.threads), _rows(wanted)


def _rows(wanted: Call) -> Rows:
    with tempfile.TemporaryDirectory() as cache:
        for way in WAYS if wanted.target in CACHED else WAYS[:2]:
            one = replace(wanted, budget=None) if way == "dense" else wanted
            yield {"way": way, **_in_a_process(one, cache if "cache" in way else None)}


def _in_a_process(wanted: Call, cache: str | None) -> dict[str, float]:
    """Run `first_call` there. Raises `OptionError` where it failed."""
    with tempfile.TemporaryDirectory() as own:  # Inductor keeps a cache of its own, which must not be warm
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": own, "OMP_NUM_THREADS": str(wanted.threads)}
        environment |= {"PRUNEPASS_CACHE": cache} if cache else {}
        call = [sys.executable, "-m", "benchmarks.tasks.first_call", json.dumps(asdict(wanted))]
        done = subprocess.run(call, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptionError(f"{wanted} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def first_call(wanted: Call) -> dict[str, float]:
    """Seconds of the first call less those of the second, and mebibytes that the process grew by."""
    shape, target = find_model(wanted.model), find_target(wanted.target)
    model = shape.build()
    plan = PrunePlan(())
    if wanted.budget is not None:
        planner = Planner(model, inputs(model, 2, 16), wanted.scorer, wanted.stages)
        plan = planner.plan(Fraction(wanted.budget), [wanted.length])
    model = model.to(target.device, target.dtype)
    example = inputs(model, 1, wanted.length)
    with runtime_state(wanted.threads):
        before = _peak()
        wall, cpu = time.perf_counter(), time.process_time()
        run = compile_for(target, model, plan, example, How(dynamic=True, threads=wanted.threads))
        run(**example)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = _peak()
        began = time.perf_counter()
        run(**example)
        again = time.perf_counter() - began
    return {"seconds": round(wall - again, 2), "cpu_seconds": round(cpu, 2), "mebibytes": round(peak - before)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(first_call(Call(**json.loads(sys.argv[1])))))
