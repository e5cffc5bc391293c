"""How training and search tell of what they do, and are told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from transformers import TrainerCallback

from prunepass.training.loop.processes import world_size

__all__ = ["Progress", "Silent", "Stop", "Telling"]


class Progress(Protocol):
    """Told of stretches of work; one may lie within another, such as a search within training."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A stretch of ``total`` steps begins, of which ``done`` were done by an earlier run."""

    def step(self, what: str) -> None:
        """A step of the stretch that began last; ``what`` is a word on it."""

    def end(self) -> None:
        """The stretch that began last ends."""


class Silent:
    """Nobody is told."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """See `Progress`."""

    def step(self, what: str) -> None:
        """See `Progress`."""

    def end(self) -> None:
        """See `Progress`."""


class Stop:
    """Lets Ctrl-C end a training after the step that runs, with a checkpoint; a second one ends it at once.

    Args:
        on_asked: called when Ctrl-C was pressed and its work goes on to the step's end.

    Attributes:
        asked: whether Ctrl-C was pressed.
    """

    def __init__(self, on_asked: Callable[[], None] | None = None) -> None:
        self.asked = False
        self._on_asked = on_asked or (lambda: None)
        self._waits = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Takes Ctrl-C over, where this is the main thread; elsewhere, and in several processes, it stays as it is."""
        if threading.current_thread() is not threading.main_thread() or world_size() > 1:
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def waiting(self, waits: bool) -> Iterator[None]:
        """Whether the work within has an end to wait for, soon, that leaves something worth keeping."""
        before, self._waits = self._waits, waits
        try:
            yield
        finally:
            self._waits = before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self._waits:
            raise KeyboardInterrupt
        self.asked = True
        self._on_asked()


class Telling(TrainerCallback):
    """Tells of each step of a training, and ends it after one where it is asked to stop."""

    def __init__(self, trainer: Any, progress: Progress, stop: Stop) -> None:
        self._trainer, self._progress, self._stop = trainer, progress, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The steps of an earlier run count as done."""
        self._progress.begin("training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each step of the optimiser."""
        self._progress.step(f"training: {self._trainer.student.phase.value}")
        if self._stop.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also where it was stopped."""
        self._progress.end()
