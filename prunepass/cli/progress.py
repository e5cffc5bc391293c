"""Progress on stderr: a bar with the time left in a terminal, a line a minute anywhere else."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

__all__ = ["Bars", "duration"]

#: seconds between two lines where there is no terminal
EVERY = 60.0


@dataclass
class _Stretch:
    """Work of so many steps, of which some are done."""

    what: str
    total: int
    done: int
    already: int = 0
    began: float = field(default_factory=time.monotonic)
    within: float = 0.0  # seconds that stretches within it took
    task: TaskID | None = None

    def line(self, now: float) -> str:
        """Where it stands, and what is left at the speed up to now."""
        passed = now - self.began
        text = f"{self.what}: {self.done} of {self.total}, {duration(passed)} so far"
        here = self.done - self.already
        if here and self.done < self.total:
            text += f", about {duration((passed - self.within) / here * (self.total - self.done))} left"
        return text


class Bars:
    """A `prunepass.training.loop.progress.Progress` that shows on a console while it is entered.

    Args:
        hidden: show nothing.
        every: seconds between lines where the console is no terminal.
    """

    def __init__(self, console: Console, *, hidden: bool = False, every: float = EVERY) -> None:
        self._console, self._hidden, self._every = console, hidden, every
        self._open: list[_Stretch] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(
            *columns, TextColumn("left"), TimeLeftColumn(), console=console, transient=True,
            disable=hidden or not console.is_terminal,
        )  # fmt: skip
        self._over = threading.Event()
        self._lines: threading.Thread | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        if not self._hidden and not self._console.is_terminal:
            self._lines = threading.Thread(target=self._print_lines, daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._over.set()
        if self._lines is not None:
            self._lines.join()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A stretch of ``total`` steps begins within the one that runs, if any."""
        stretch = _Stretch(what, total, done, done)
        stretch.task = self._bars.add_task(what, total=total, completed=done)
        self._open.append(stretch)

    def step(self, what: str) -> None:
        """One more of the stretch that began last; ``what`` says what runs."""
        stretch = self._open[-1]
        stretch.done, stretch.what = stretch.done + 1, what
        assert stretch.task is not None
        self._bars.update(stretch.task, advance=1, description=what)

    def reach(self, what: str, done: int) -> None:
        """So many steps of the stretch that began last are done; fewer than before where some must be done again."""
        stretch = self._open[-1]
        stretch.done, stretch.what = done, what
        assert stretch.task is not None
        self._bars.update(stretch.task, completed=done, description=what)

    def end(self) -> None:
        """The stretch that began last ends."""
        stretch = self._open.pop()
        assert stretch.task is not None
        self._bars.remove_task(stretch.task)
        if self._open:
            self._open[-1].within += time.monotonic() - stretch.began

    def _print_lines(self) -> None:
        while not self._over.wait(self._every):
            if self._open:
                self._console.print(
                    self._open[-1].line(time.monotonic()), highlight=False, markup=False, soft_wrap=True
                )


def duration(seconds: float) -> str:
    """In words: ``"40 s"``, ``"12 min"``, ``"3 h 05 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
