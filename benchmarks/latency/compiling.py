"""What the first call costs: tracing, the passes, conversion and compilation, dense, pruned, and pruned from the cache.

Each is measured in a process of its own, which imports everything before the clock starts. CPU seconds are of all
threads. Memory is how far the most that the process held at any time rose above the most that it held before the call,
where building the model and counting a plan's FLOPs may have been more: take it as a lower bound.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.latency.cells import compile_for, runtime_state
from benchmarks.latency.conditions import conditions
from benchmarks.latency.models import find_model, inputs
from benchmarks.latency.plans import Planner
from benchmarks.latency.targets import How, find_target
from prunepass import PrunePlan
from prunepass.errors import OptionError

__all__ = ["CACHED", "Compiling", "measure_compiling"]

log = logging.getLogger(__name__)

#: targets whose converted models the package keeps on disk
CACHED = ("openvino-f32", "openvino-bf16", "onnxruntime-f32")
_ROOT = Path(__file__).parents[2]
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Compiling:
    """What is compiled.

    Attributes:
        budget: share of the dense FLOPs, as text; None for the model as it is.
        length: tokens of the first call, of one row.
    """

    model: str
    target: str
    budget: str | None
    length: int = 128
    scorer: str = "norm"
    stages: int = 4
    threads: int = 1


def measure_compiling(wanted: Compiling) -> dict[str, Any]:
    """The record of a model on a target: seconds and memory of the first call, each in a fresh process.

    Raises:
        OptionError: the target cannot be measured here, or a process failed.
    """
    target = find_target(wanted.target)
    if reason := target.why_not():
        raise OptionError(f"Target {wanted.target} cannot be measured: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: _in_a_process(one, cache) for name, one, cache in _ways(wanted, folder)}
    return {**asdict(wanted), **conditions(target, wanted.threads), "first_call": ways}


def _ways(wanted: Compiling, folder: str) -> Iterator[tuple[str, Compiling, str | None]]:
    yield "dense", replace(wanted, budget=None), None
    yield "pruned", wanted, None
    if wanted.target in CACHED:
        yield "pruned, filling the cache", wanted, folder
        yield "pruned, from the cache", wanted, folder


def _in_a_process(wanted: Compiling, cache: str | None) -> dict[str, float]:
    """Run `first_call` there."""
    with tempfile.TemporaryDirectory() as own:  # Inductor keeps a cache of its own, which must not be warm
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": own, "OMP_NUM_THREADS": str(wanted.threads)}
        environment |= {"PRUNEPASS_CACHE": cache} if cache else {}
        call = [sys.executable, "-m", "benchmarks.latency.compiling", json.dumps(asdict(wanted))]
        done = subprocess.run(call, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptionError(f"{wanted} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'no message'}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    log.info("%s: %s", wanted, found)
    return found


def first_call(wanted: Compiling) -> dict[str, float]:
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MEBIBYTE


if __name__ == "__main__":
    print(json.dumps(first_call(Compiling(**json.loads(sys.argv[1])))))
