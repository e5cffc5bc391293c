"""Ray Data as the engine: shards go to actors that keep the compiled model, on one machine or many.

Ray may run a shard more than once: an actor dies, a node is lost. A shard's file is named by its number and appears in
one step, so the last one written stands and each document is in the output once. What is done is known from the
files, not from Ray's own checkpoints, so that a run that was begun with one engine can be gone on with by the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunepass.bulk.output import Counts, Output, Run
from prunepass.bulk.progress import Told
from prunepass.bulk.shards import open_embedder, run_shard
from prunepass.errors import MissingExtraError, OptionError, PruneError, option

__all__ = ["require", "run_ray"]


def require() -> Any:
    """The package ``ray`` with its data sets, or `MissingExtraError`."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "ray", f"{option('engine', 'ray')}") from None
    return ray


class Actor:
    """A process of Ray's with the model of a run.

    Args:
        output: folder of the run, on storage that all nodes share.
        cpus: threads. Ray sets OMP_NUM_THREADS, which neither OpenVINO nor ONNX Runtime heeds.
    """

    def __init__(self, output: str, cpus: int) -> None:
        self._output = Output(Path(output))
        run = self._output.read()
        if run is None:
            raise PruneError(f"{output} is not there on this node; Ray needs storage that all nodes share.")
        self._run = run
        self._embedder = open_embedder(run, cpus)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the shards of a batch. What goes wrong is an answer: Ray would try the same again."""
        found: dict[str, list[Any]] = {"shard": [], "rows": [], "wrong": [], "tokens": [], "error": []}
        for number in batch["shard"].tolist():
            counts, error = Counts(0, 0, 0), ""
            try:
                counts = run_shard(self._embedder, self._run, self._output, number)
            except Exception as e:  # it is the answer, and the driver raises it
                error = f"{type(e).__name__}: {' '.join(str(e).split())}"
            values = (number, counts.rows, counts.wrong, counts.tokens, error)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        return {name: _numpy(values) for name, values in found.items()}


def _numpy(values: list[Any]) -> Any:
    import numpy

    return numpy.array(values)


def run_ray(output: Output, run: Run, shards: Sequence[int], workers: int, cpus: int | None, told: Told) -> None:
    """Do all shards in ``workers`` actors. Starts Ray on this machine where none is connected or named by RAY_ADDRESS.

    Raises:
        OptionError: the cluster has not as many cores.
        PruneError: what an actor raised.
    """
    ray = require()
    threads = cpus or 1
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        there = ray.cluster_resources().get("CPU", 0)
        workers = min(workers, len(shards))
        if workers * threads > there:
            raise OptionError(
                f"{option('workers', workers)} of {threads} cores each are more than the {math.floor(there)} that Ray "
                f"has; take fewer, or name a cluster by RAY_ADDRESS."
            )
        _run(ray, output, shards, workers, threads, told)
    finally:
        if ours:
            ray.shutdown()


def _run(ray: Any, output: Output, shards: Sequence[int], workers: int, threads: int, told: Told) -> None:
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        # a block a shard: an actor that has died loses one
        data = ray.data.from_items([{"shard": number} for number in shards], override_num_blocks=len(shards))
        data = data.map_batches(
            Actor,
            batch_size=1,
            fn_constructor_args=(str(output.folder.resolve()), threads),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
        )
        for row in data.iter_rows():
            if row["error"]:
                raise PruneError(f"A worker failed: {row['error']}")
            told.finished(int(row["shard"]), Counts(int(row["rows"]), int(row["wrong"]), int(row["tokens"])))
    finally:
        context.enable_progress_bars = shown
