"""The command ``prunepass eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from prunepass.backends import get_target, target_names
from prunepass.backends._options import pairs, unknown
from prunepass.cli.common import err, out, print_json, working
from prunepass.cli.flags import taking_flags
from prunepass.cli.options import Json
from prunepass.cli.progress import Bars
from prunepass.errors import OptionError, option
from prunepass.plan.folders import check_file
from prunepass.training.data.options import EvalOptions
from prunepass.training.loop.trial import DISTANCE, Entry, Trial

__all__ = ["evaluate"]


@taking_flags()
def evaluate(
    options: EvalOptions,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw score against time, into this .svg, .png or .pdf file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare plans on rows with labels: score, FLOPs and time, beside the dense model, cut texts and random tokens."""
    from prunepass.training.loop.prepare import prepare_trial
    from prunepass.training.loop.trial import evaluate as run

    pairs(options.config)
    if options.target not in target_names():
        raise OptionError(unknown(options.target, "target", target_names()))
    if options.timed or options.deployed:
        get_target(options.target)
    elif options.config:
        raise OptionError(
            f"{option('config')} is for what runs on a target: leave out {option('timed', 0)}, or take "
            f"{option('deployed', True)}."
        )
    if picture is not None:
        from prunepass.cli.picture import check_picture

        check_file(picture)
        check_picture(picture)
    with working("loading the model and reading the data"):
        ready = prepare_trial(options)
    with Bars(err) as bars:
        trial = run(options, ready, bars)
    if as_json:
        print_json(trial.to_dict())
    else:
        _print(trial)
    if picture is not None:
        from prunepass.cli.picture import draw

        draw(trial, picture)
        err.print(f"Picture written to {picture}", highlight=False, markup=False, soft_wrap=True)


def _print(trial: Trial) -> None:
    details = trial.details
    table = Table(title=f"{details['rows']:,} rows of {details['data']}")
    timed = trial.entries[0].milliseconds is not None
    columns = ["FLOPs", *(["ms", "times as fast"] if timed else []), trial.headline, "change"]
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    for entry in trial.entries:
        table.add_row(entry.name, f"{entry.flops:.0%}", *_times(entry, timed), *_figures(entry, trial.headline))
    out.print(table)
    if details["deployed"]:
        out.print(f"Scores computed on {details['target']}.", highlight=False)
    out.print(f"In brackets: {details['interval_method']}.", highlight=False, soft_wrap=True)
    if timed:
        calls, rounds = _counted(details["calls"], "text"), _counted(details["repeats"], "round")
        where = f"{details['target']}, {_counted(details['threads'], 'thread')}, in {details['precision']}"
        said = f"Time: one text a call, {calls} from short to long, medians of {rounds} in turns on {where}."
        out.print(said, highlight=False, markup=False, soft_wrap=True)
    for warning in trial.warnings:
        out.print(f"Note: {warning}", highlight=False, markup=False, soft_wrap=True)
    for verdict in trial.verdicts:
        out.print(verdict, highlight=False, markup=False, soft_wrap=True)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _times(entry: Entry, timed: bool) -> list[str]:
    if not timed:
        return []
    if entry.milliseconds is None or entry.speedup is None:
        return ["", ""]
    middle, low, high = entry.speedup
    return [f"{entry.milliseconds:.2f}", f"{middle:.2f}\n({low:.2f} to {high:.2f})"]


def _figures(entry: Entry, headline: str) -> list[str]:
    digits = 4 if headline == DISTANCE else 3
    change = entry.changes.get(headline)
    return [
        f"{entry.figures[headline]:.{digits}f}{_interval(entry.intervals.get(headline), f'.{digits}f')}",
        _interval(change, f"+.{digits}f").strip(),
    ]


def _interval(bounds: tuple[float, float] | None, form: str) -> str:
    return "" if bounds is None else f"\n\\[{bounds[0]:{form}}, {bounds[1]:{form}}]"
