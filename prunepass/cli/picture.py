"""The picture of ``prunepass eval``: score against time, or against FLOPs where nothing was timed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from prunepass.errors import ExportError, MissingExtraError, OptionError, option
from prunepass.training.loop.trial import CUT, DENSE, DISTANCE, PLAN, RANDOM, Entry, Trial

__all__ = ["check_picture", "draw"]

KINDS = (".svg", ".png", ".pdf")
_MARKS = {DENSE: ("o", "black"), PLAN: ("o", "tab:blue"), CUT: ("s", "tab:orange"), RANDOM: ("x", "tab:gray")}
_LABELS = {DENSE: "dense", PLAN: "plan", CUT: "cut texts, equal FLOPs", RANDOM: "random tokens"}


def check_picture(path: Path) -> None:
    """Raises `OptionError` where the file's name ends otherwise, `MissingExtraError` without matplotlib."""
    if path.suffix.lower() not in KINDS:
        raise OptionError(f"{option('picture')} writes {', '.join(KINDS)}; {path.name!r} ends otherwise.")
    try:
        import matplotlib  # noqa: F401  # whether it is there
    except ImportError:
        raise MissingExtraError("matplotlib", "viz", "A picture") from None


def draw(trial: Trial, path: Path) -> None:
    """Write the picture: a mark an entry, with the interval of its score. Raises `ExportError` where it cannot be."""
    from matplotlib.figure import Figure

    timed = trial.entries[0].milliseconds is not None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, (mark, colour) in _MARKS.items():
        placed = [(entry, _across(entry, trial)) for entry in trial.entries if entry.kind == kind]
        entries = [entry for entry, x in placed if x is not None]
        across = [x for _, x in placed if x is not None]
        if not entries:
            continue
        up = [entry.figures[trial.headline] for entry in entries]
        bounds = [entry.intervals.get(trial.headline, (value, value)) for entry, value in zip(entries, up, strict=True)]
        spread = [[max(0.0, v - low) for v, (low, _) in zip(up, bounds, strict=True)]]
        spread.append([max(0.0, high - v) for v, (_, high) in zip(up, bounds, strict=True)])
        axes.errorbar(across, up, yerr=spread, fmt=mark, color=colour, capsize=3, label=_LABELS[kind])
        for entry, x, y in zip(entries, across, up, strict=True):
            if kind == PLAN:
                axes.annotate(entry.name, (x, y), textcoords="offset points", xytext=(6, 6), fontsize="small")
    axes.set_xlabel(f"milliseconds a text, {trial.details['target']}" if timed else "share of the dense model's FLOPs")
    axes.set_ylabel("distance from the dense model's answers" if trial.headline == DISTANCE else trial.headline)
    axes.set_title(f"{trial.details['rows']:,} rows of {Path(str(trial.details['data'])).name}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.lower()[1:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn.getvalue())
    except OSError as e:
        raise ExportError(f"{path} could not be written: {e}. The figures above are complete.") from None


def _across(entry: Entry, trial: Trial) -> float | None:
    """Its place from left to right; random tokens were not timed, and take the time of their plan."""
    if trial.entries[0].milliseconds is None:
        return entry.flops
    if entry.milliseconds is not None:
        return entry.milliseconds
    return next((e.milliseconds for e in trial.entries if e.kind == PLAN and e.name == entry.of), None)
