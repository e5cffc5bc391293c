"""A worker process: shards it is told of by lines on standard input, what became of them by lines on standard output.

It ends with its parent: when standard input ends before it was told to stop, whatever it does is broken off.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from prunepass.bulk.output import Output
from prunepass.bulk.shards import open_embedder, run_shard
from prunepass.errors import PruneError, options_written

__all__ = ["main"]

#: seconds between two words on how far a shard is
EVERY = 0.25


def main() -> None:
    """Serve until told to stop.

    The first line is ``{"output": folder, "cpus": 2, "flags": true}``, where ``flags`` says that messages write options
    as the command line does; then ``{"shard": 5}`` each, then ``{"stop": true}``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    # private ones: what a library prints is no answer, and a process that it forks must not hold the pipes
    answers, orders = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    # on its import OpenVINO would fork a process that reports the use to its makers, and outlives a worker's end
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # none: its import fails
    told: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders, told), daemon=True).start()
    try:
        _serve(told, answers)
    except BrokenPipeError:
        os._exit(1)
    except Exception as e:  # the parent says it, in one line
        _answer(answers, error=" ".join(str(e).split()) or type(e).__name__, kind=type(e).__name__)
        if not isinstance(e, PruneError) and os.environ.get("PRUNEPASS_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
    answers.flush()
    os._exit(0)  # nothing is left to do, and no runtime has a say in how its threads end


def _listen(orders: IO[str], told: queue.SimpleQueue[Mapping[str, Any]]) -> None:
    for line in orders:
        told.put(json.loads(line))
        if "stop" in line:
            return
    os._exit(1)


def _serve(told: queue.SimpleQueue[Mapping[str, Any]], answers: IO[str]) -> None:
    first = told.get()
    with options_written(_flag) if first["flags"] else contextlib.nullcontext():
        _work(first, told, answers)


def _flag(name: str, *value: object) -> str:
    shown = [] if not value or value[0] is True else [str(value[0])]
    return " ".join(["--" + name.replace("_", "-"), *shown])


def _work(first: Mapping[str, Any], told: queue.SimpleQueue[Mapping[str, Any]], answers: IO[str]) -> None:
    output = Output(Path(first["output"]))
    run = output.read()
    assert run is not None
    embedder = open_embedder(run, first["cpus"])
    _answer(answers, ready=True)
    while "shard" in (order := told.get()):
        number = order["shard"]
        counts = run_shard(embedder, run, output, number, _Progress(answers))
        _answer(answers, done=number, rows=counts.rows, wrong=counts.wrong, tokens=counts.tokens)


class _Progress:
    """Says now and then how many documents and tokens of a shard are done."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._documents = self._tokens = 0
        self._said = time.monotonic()

    def __call__(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            _answer(self._answers, documents=self._documents, tokens=self._tokens)


def _answer(answers: IO[str], **said: Any) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
