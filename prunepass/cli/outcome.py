"""How ``prunepass train`` and ``search`` show what they end with."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from prunepass.cli.common import out
from prunepass.training.loop.outcome import Outcome, Taken

__all__ = ["print_outcome"]


def print_outcome(outcome: Outcome, unit: str) -> None:
    """Stages and figures as tables, and what they cost in ``unit``."""
    out.print(_stages(outcome))
    if outcome.plan.protect.first > 1:
        out.print(f"The first {outcome.plan.protect.first} tokens of each row stay, whatever their scores.")
    out.print(_figures(outcome, unit))
    if outcome.intervals:
        method = outcome.details.get("interval_method", "95 %")
        out.print(f"In brackets: {method}.", highlight=False, soft_wrap=True)
    out.print(f"{unit}: {outcome.cost_share:.1%} of the dense model's", highlight=False)
    if outcome.taken is not None:
        out.print(_said(outcome.taken), highlight=False, soft_wrap=True)


def _said(taken: Taken) -> str:
    """Which state was taken, and by what."""
    values = taken.values
    figure = "distance from the unpruned model's answers" if taken.figure == "loss" else taken.figure
    said = (
        f"Taken: the state after step {taken.step} of {taken.steps}, the best of {len(values)} on {taken.rows:,} "
        f"validation rows ({figure} {values[taken.step]:.4f}"
    )
    if taken.is_last:
        return f"{said}). It is the last one."
    said = f"{said}; {values[max(values)]:.4f} at the end)."
    if not taken.unadapted:
        return said
    return f"{said} Its own weights are as they were: adapting made it no better on these rows. Try a lower --lr."


def _stages(outcome: Outcome) -> Table:
    table = Table(title="stages")
    for name in ("place", "scorer", "keep"):
        table.add_column(name)
    for i, stage in enumerate(outcome.plan.stages):
        table.add_row(stage.place, outcome.plan.scorer_of(i).name, f"{float(stage.keep):.4g}")
    return table


def _figures(outcome: Outcome, unit: str) -> Table:
    """A row a model: dense, dense on texts cut to equal cost, pruned, and what pruning changes."""
    kind = "calibration" if outcome.details.get("command") == "search" else "held-out"
    count = "" if outcome.rows is None else f"{outcome.rows:,} "
    table = Table(title=f"on {count}{kind} rows")
    table.add_column("")
    names = list(outcome.pruned)
    for name in names:
        table.add_column(name, justify="right")
    models: dict[str, tuple[str, Mapping[str, float]]] = {"dense": ("dense", outcome.dense)}
    if outcome.truncated:
        models[f"text cut to {outcome.truncated_to} tokens (equal {unit})"] = ("truncated", outcome.truncated)
    models["pruned"] = ("pruned", outcome.pruned)
    for title, (key, figures) in models.items():
        table.add_row(title, *(_cell(figures.get(name), outcome.intervals.get(key, {}).get(name)) for name in names))
    differences = {n: outcome.pruned[n] - outcome.dense[n] for n in names if n in outcome.dense}
    shown = outcome.intervals.get("pruned - dense", {})
    table.add_row("pruned - dense", *(_cell(differences.get(name), shown.get(name), sign="+") for name in names))
    return table


def _cell(value: float | None, interval: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:{sign}.4f}"
    return text if interval is None else f"{text}\n[{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"
