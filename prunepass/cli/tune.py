"""The command ``prunepass tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

import prunepass
from prunepass.cli.common import err, out, print_json, working
from prunepass.cli.flags import taking_flags
from prunepass.cli.options import Json
from prunepass.cli.progress import Bars
from prunepass.cli.stopping import again, interruptible, say_stopping
from prunepass.plan import PrunePlan
from prunepass.training.data.tuning import TuneOptions
from prunepass.training.loop.output import OUTCOME_FILE, new_folder
from prunepass.training.loop.trial import DENSE
from prunepass.training.loop.tune import Tuned, clear_work, prepare_tuning, work_of
from prunepass.training.loop.tune import tune as run

__all__ = ["tune"]

#: how the best is written, by target; any other gets a folder that torch.compile reads
_FORMATS: dict[str, Literal["openvino", "onnx"]] = {"openvino": "openvino", "onnxruntime": "onnx"}


@taking_flags()
def tune(options: TuneOptions, as_json: Json = False) -> None:
    """Try plans, targets and precisions, and write the fastest folder that loses at most --loss points."""
    with interruptible(
        lambda: f"Plans found so far are kept in {work_of(options.out)}. Go on with {again('--resume')}"
    ):
        with working("loading the model and reading the data"):
            ready = prepare_tuning(options)
        from prunepass.training.loop.progress import Stop

        with Bars(err) as bars:
            tuned = run(options, ready, bars, Stop(say_stopping))
        with working("writing"):
            _write(tuned, options, ready.chosen_by.loaded.tokenizer)
    clear_work(options)
    if as_json:
        print_json(tuned.to_dict())
        return
    _print(tuned, options)
    err.print(f"Written to {options.out}", highlight=False, markup=False, soft_wrap=True)


def _how_to_go_on(options: TuneOptions) -> str:
    work = work_of(options.out)
    if not work.is_dir():
        return f"Nothing was written. Start anew with {again()}"
    return f"Plans found so far are kept in {work}. Go on with {again('--resume')}"


def _write(tuned: Tuned, options: TuneOptions, tokenizer: Any) -> None:
    plan = PrunePlan(()) if tuned.best.entry.plan is None else tuned.best.entry.plan
    to = _FORMATS.get(tuned.best.setting.target)
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        if to is None:
            plan.save_pretrained(folder)
            parts: tuple[Any, Any] = (tuned.model, tokenizer)
            for part in parts:
                part.save_pretrained(folder)
        else:
            written = Path(folder) / "exported"
            int8 = tuned.ranges or False
            prunepass.export(tuned.model, plan, written, to=to, tokenizer=tokenizer, int8=int8, stateful=False)
            for file in written.iterdir():
                file.rename(folder / file.name)
            written.rmdir()
        (folder / OUTCOME_FILE).write_text(json.dumps(tuned.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")


def _print(tuned: Tuned, options: TuneOptions) -> None:
    table = Table(title=f"At most {options.loss:g} points lost")
    table.add_column("target")
    table.add_column("plan", overflow="fold")
    for name in ("FLOPs", "ms", "times as fast", "points lost"):
        table.add_column(name, justify="right")
    for one in sorted(tuned.tried, key=lambda one: one.entry.milliseconds or 0.0):
        mark = "[bold]" if one is tuned.best else ""
        speed = "" if one.entry.speedup is None else f"{one.entry.speedup[0]:.2f}"
        cells = [f"{one.entry.flops:.0%}", f"{one.entry.milliseconds:.2f}", speed, f"{one.lost:.1f}"]
        table.add_row(*(f"{mark}{cell}" for cell in (str(one.setting), one.entry.name, *cells)))
    out.print(table)
    said = "Times as fast: as the dense model on the same target. Points are lost against the dense model in PyTorch."
    out.print(said, highlight=False, soft_wrap=True)
    for skipped in tuned.skipped:
        out.print(f"Not tried: {skipped}", highlight=False, markup=False, soft_wrap=True)
    best = tuned.best
    if best.entry.kind == DENSE:
        out.print(
            f"The dense model on {best.setting} is the fastest that loses no more: no plan is worth it on these rows.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    elif tuned.report is not None:
        rows = tuned.report.details["rows"]
        out.print(f"On {rows:,} rows that nothing was chosen by, {best.setting}:", highlight=False)
        for verdict in tuned.report.verdicts:
            out.print(verdict, highlight=False, markup=False, soft_wrap=True)
    if best.setting.config:
        said = ", ".join(f"{key}={value}" for key, value in best.setting.config.items())
        out.print(f"Run it with {said}.", highlight=False, markup=False, soft_wrap=True)
