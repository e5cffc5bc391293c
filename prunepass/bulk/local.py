"""Worker processes on this machine: each does shards; one that ends early is started again, and its shard with it."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import prunepass.errors as errors
from prunepass.bulk.cores import cores
from prunepass.bulk.output import Counts, Output
from prunepass.bulk.progress import Told
from prunepass.errors import OptionError, PruneError, option

__all__ = ["run_local"]

#: a shard that has ended so many processes is not tried again
MOST_DEATHS = 5


def run_local(output: Output, shards: Sequence[int], workers: int, cpus: int | None, told: Told) -> None:
    """Do all shards of the run in a folder.

    Args:
        workers: processes.
        cpus: threads of each. None shares out the cores that this process may use.

    Raises:
        PruneError: what a worker raised; or a shard has ended several processes.
    """
    workers = min(workers, len(shards))
    pool = _Pool(output, deque(shards), cpus or max(1, cores() // max(1, workers)), told)
    # each with the context of this thread, which says how messages write options
    contexts = [contextvars.copy_context() for _ in range(workers)]
    threads = [threading.Thread(target=context.run, args=(pool.serve,), daemon=True) for context in contexts]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            error = _waited(pool.ended)
            if error is not None:
                raise error
    finally:
        pool.kill()
        for thread in threads:
            thread.join()


def _waited(ended: queue.SimpleQueue[BaseException | None]) -> BaseException | None:
    """The next word; in small steps, as a wait without end would not hear Ctrl-C everywhere."""
    while True:
        try:
            return ended.get(timeout=0.5)
        except queue.Empty:
            continue


@dataclass
class _Pool:
    """What the threads share, one of which there is for each process.

    Attributes:
        ended: has an entry for each thread that ended: why, or None where no work is left.
    """

    output: Output
    waiting: deque[int]
    cpus: int
    told: Told
    ended: queue.SimpleQueue[BaseException | None] = field(default_factory=queue.SimpleQueue)
    deaths: dict[int | None, int] = field(default_factory=dict)
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False

    def serve(self) -> None:
        """Keep one process at work until there is none."""
        try:
            while self._serve_once():
                pass
            self.ended.put(None)
        except BaseException as e:
            self.ended.put(e)

    def kill(self) -> None:
        """End all processes, and start none from now on."""
        with self.lock:
            self.over = True
            for process in self.processes:
                process.kill()

    def _serve_once(self) -> bool:
        """One process, up to its end. Whether another is needed."""
        with self.lock:
            if self.over or not self.waiting:
                return False
            process = _started(self.cpus)
            self.processes.add(process)
        number: int | None = None
        try:
            flags = option("resume", True).startswith("--")
            _send(process, output=str(self.output.folder), cpus=self.cpus, flags=flags)
            self._heard(process, None, "ready")
            while (number := self._next()) is not None:
                _send(process, shard=number)
                said = self._heard(process, number, "done")
                counts = Counts(said["rows"], said["wrong"], said["tokens"])
                self.told.finished(number, counts)
                self.deaths.pop(None, None)
            _send(process, stop=True)
            process.wait()
            return False
        except (_DeathError, BrokenPipeError):
            self._buried(process, number)
            return True
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()
            with self.lock:
                self.processes.discard(process)

    def _next(self) -> int | None:
        with self.lock:
            return None if self.over or not self.waiting else self.waiting.popleft()

    def _heard(self, process: subprocess.Popen[str], number: int | None, wanted: str) -> Mapping[str, Any]:
        for line in _out(process):
            if not line.endswith("\n"):
                break
            said = json.loads(line)
            if "error" in said:
                raise _error(said)
            if wanted in said:
                return dict(said)
            if number is not None:
                self.told.reached(number, said["documents"], said["tokens"])
        raise _DeathError

    def _buried(self, process: subprocess.Popen[str], number: int | None) -> None:
        """A process has ended; its shard is the next again. Raises where it is not the first of that shard."""
        code = process.wait()
        counts = None if number is None else self.output.counts(number)
        if number is not None and counts is not None:
            self.told.finished(number, counts)  # it was written, and only the answer is missing
            return
        with self.lock:
            if number is not None:
                self.waiting.appendleft(number)
                self.told.lost(number)
            if self.over:
                return
            self.deaths[number] = self.deaths.get(number, 0) + 1
            if self.deaths[number] < MOST_DEATHS:
                return
        doing = "at its start" if number is None else f"at {self.output.part(number).name}"
        raise PruneError(
            f"A worker ended {MOST_DEATHS} times {doing}, the last time {_how(code)}. Memory is short, as a rule: take "
            f"fewer {option('workers')} or a smaller {option('tokens')}. What is whole stays."
        )


class _DeathError(Exception):
    """A process ended while an answer was awaited."""


def _started(cpus: int) -> subprocess.Popen[str]:
    # tokenizers and OpenMP would start a thread for each core of the machine
    threads = {name: str(cpus) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    env = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "true" if cpus > 1 else "false"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "prunepass.bulk.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=env,
    )


def _send(process: subprocess.Popen[str], **order: Any) -> None:
    stdin = process.stdin
    assert stdin is not None
    stdin.write(json.dumps(order) + "\n")
    stdin.flush()


def _out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def _error(said: Mapping[str, Any]) -> PruneError:
    """Ours as they were raised; of others, the kind and what they say."""
    kind = getattr(errors, said["kind"], None)
    if (
        isinstance(kind, type)
        and issubclass(kind, PruneError)
        and kind in (OptionError, errors.DataError, errors.ExportError)
    ):
        return kind(said["error"])
    prefix = "" if kind is not None else f"A worker failed: {said['kind']}: "
    return PruneError(prefix + said["error"])


def _how(code: int) -> str:
    try:
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    except ValueError:
        return f"with code {code}"
