"""Trains the dense models that accuracy starts from, where they are missing, and scores all."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.accuracy import teachers
from benchmarks.accuracy.tasks import TASKS, find_task
from benchmarks.markdown import table
from benchmarks.task import Say, Task, option


@dataclass(frozen=True)
class Benchmark(Task):
    tasks: tuple[str, ...] = option(tuple(TASKS), "which")
    max_steps: int | None = option(None, "a trial: train so many steps, and keep nothing", type=int)

    def prepare(self, say: Say) -> None:
        lines = []
        for task in map(find_task, self.tasks):
            record = teachers.teacher(task, max_steps=self.max_steps)
            tested, seconds = record["test"], record.get("training", {}).get("seconds", "")
            score = [f"{record['scores'][task.headline]:.4f}", task.headline]
            lines.append([task.name, *score, str(tested["examples"]), str(tested["mean_tokens"]), str(seconds)])
        say(table(("task", "score", "", "test examples", "mean tokens", "training seconds"), lines))
