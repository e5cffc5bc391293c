"""The command line: ``prunepass explain | export | bench | eval | tune | train | search | embed``.

It calls what scripts can call as well.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import prunepass
from prunepass.backends._options import pairs
from prunepass.cli.benched import print_bench
from prunepass.cli.common import err, out, print_json, working
from prunepass.cli.embed import embed
from prunepass.cli.evaluate import evaluate
from prunepass.cli.flags import taking_flags
from prunepass.cli.options import (
    EXAMPLE_TEXTS,
    Json,
    LengthOptions,
    ModelOptions,
    PlanOptions,
    PlansOptions,
    PoolingOptions,
    SettingOptions,
    TextOptions,
    texts_of,
)
from prunepass.cli.progress import Bars
from prunepass.cli.texts import lengths_in_words
from prunepass.cli.train import search, train
from prunepass.cli.tune import tune
from prunepass.errors import OptionError, PlanError, option
from prunepass.export.folder import check_folder
from prunepass.plan.choice import DEFAULT, choose
from prunepass.plan.folders import check_file
from prunepass.report.bench import Batch, bench

if TYPE_CHECKING:
    from prunepass.plan.annotations import Pooling

__all__ = ["app"]

app = typer.Typer(
    name="prunepass",
    help="Token pruning for transformers as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


#: of --file; more change the measured ranges little
CALIBRATION_TEXTS = 128


class ExportFormat(StrEnum):
    """What a pruned model can be written as."""

    OPENVINO = "openvino"
    ONNX = "onnx"
    PT2 = "pt2"


HtmlOpt = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")]
TargetOpt = Annotated[str | None, typer.Option(help="Runtime whose fusions are counted: inductor, openvino, ...")]


def _version(asked: bool) -> None:
    if asked:
        out.print(f"prunepass {prunepass.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the passes do.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's own, while it exports
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command()
@taking_flags()
def explain(
    model: ModelOptions,
    plan: PlanOptions,
    texts: TextOptions,
    length: LengthOptions,
    target: TargetOpt = None,
    html: HtmlOpt = None,
    as_json: Json = False,
) -> None:
    """Show the blocks, what each keeps, the FLOPs saved, also with no token pruned, and what is refused and why."""
    if html is not None:
        check_file(html)
    chosen, said = texts_of(texts), plan.read()
    with working("loading and tracing"):
        loaded = model.load()
        inputs = loaded.encode(chosen[:EXAMPLE_TEXTS], max_length=length.max_length)
        lengths = loaded.lengths(chosen, max_length=length.max_length)
        report = prunepass.explain(
            loaded.model,
            plan.choose(said, loaded),
            inputs,
            target=target,
            lengths=lengths,
            tokenizer=loaded.tokenizer,
            text=chosen[0],
        )
    for refusal in report.refusals:
        if refusal.fault == "plan":
            raise PlanError(refusal.reason)
    if html is not None:
        report.to_html(html)
        err.print(f"Report written to {html}", highlight=False)
    if as_json:
        print_json(report.to_dict())
    else:
        out.print(str(report), highlight=False, markup=False, soft_wrap=True)
        out.print(f"\n{lengths_in_words(lengths)}", highlight=False, soft_wrap=True)


@app.command()
@taking_flags(
    helps={
        "plan": "Folder of a saved plan, name of one that comes along, or 'default' for the training-free one. Given "
        "more than once: one program with an input 'level' that chooses at each call, 0 for all tokens. Default: the "
        "plan in MODEL's folder, or else the training-free one.",
        "text": "With --int8: a text to calibrate on; may be given more than once.",
        "file": "With --int8: UTF-8 file with one text to calibrate on a line.",
    }
)
def export(
    model: ModelOptions,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write. It must not exist or be empty.")],
    plan: PlansOptions,
    pool: PoolingOptions,
    calibration: TextOptions,
    to: Annotated[ExportFormat, typer.Option(help="Format of the exported model.")] = ExportFormat.OPENVINO,
    length: Annotated[int | None, typer.Option(min=1, help="Fix the length; it stays dynamic otherwise.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Fix the batch size; it stays dynamic otherwise.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise; with openvino, ranges come from --file.")] = False,
    stateful: Annotated[
        bool | None,
        typer.Option(
            "--stateful/--no-stateful",
            help="Whether the key-value cache is inside; by default for a model that generates, to openvino.",
        ),
    ] = None,
) -> None:
    """Write the pruned model so that the runtime alone runs it: OpenVINO IR, ONNX, or a torch.export program."""
    folder = check_folder(folder)
    texts, said = _calibration_texts(to, int8, calibration), plan.read()
    with working("loading, pruning and converting"):
        loaded = model.load()
        choice = plan.choose(said, loaded)
        choice = choice if choice.asks else choose(DEFAULT)
        prunepass.export(
            loaded.model,
            choice,
            folder,
            to=to.value,
            tokenizer=loaded.tokenizer,
            length=length,
            batch=batch,
            int8=loaded.batches(texts, rows=batch or 1, length=length) if texts else int8,
            stateful=stateful,
            pooled=pool.pooled,
            pooling=cast("Pooling | None", pool.pooling),  # checked where it is declared
            normalize=pool.normalize,
        )
    err.print(f"Pruned by {choice.source}.", highlight=False, soft_wrap=True)
    for written in sorted(p for p in folder.rglob("*") if p.is_file()):
        out.print(f"{written}  {written.stat().st_size / 1e6:.2f} MB", highlight=False, soft_wrap=True)


@app.command(name="bench")
@taking_flags()
def bench_command(
    model: ModelOptions,
    plan: PlanOptions,
    given: TextOptions,
    length: LengthOptions,
    setting: SettingOptions,
    target: Annotated[str, typer.Option(help="inductor, openvino, onnxruntime or eager.")] = "inductor",
    texts: Annotated[int, typer.Option(min=1, help="How many texts to take.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds over all texts.")] = 10,
    html: HtmlOpt = None,
    as_json: Json = False,
) -> None:
    """Time the dense and the pruned model in turn on one target, and compare what they put out."""
    if html is not None:
        check_file(html)
    chosen, said = texts_of(given, count=texts)[:texts], plan.read()
    settings = pairs(setting.config)
    with working("loading"):
        loaded = model.load()
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    batches: list[Batch] = [loaded.encode(part, max_length=length.max_length) for part in parts]
    with Bars(err) as bars:
        bars.begin("compiling", len(batches) * (repeats + 1))
        result = bench(
            loaded.model,
            plan.choose(said, loaded),
            batches,
            target=target,
            repeats=repeats,
            config=settings,
            on_step=bars.step,
        )
    if html is not None:
        report = prunepass.explain(
            loaded.model,
            result.plan,
            loaded.encode(chosen[:EXAMPLE_TEXTS], max_length=length.max_length),
            lengths=loaded.lengths(chosen, max_length=length.max_length),
            tokenizer=loaded.tokenizer,
            text=chosen[0],
        )
        result.added_to(replace(report, plan_source=result.plan_source)).to_html(html)
        err.print(f"Report written to {html}", highlight=False)
    if as_json:
        print_json({"model": model.model, **result.to_dict()})
    else:
        print_bench(result)


app.command(name="eval")(evaluate)
app.command()(tune)
app.command()(train)
app.command()(search)
app.command()(embed)


# -- from options to objects -----------------------------------------------------------------------------------------


def _calibration_texts(to: ExportFormat, int8: bool, given: TextOptions) -> list[str]:
    is_given = bool(given.text) or given.file is not None
    if not int8 and is_given:
        raise OptionError(
            f"{option('text')} and {option('file')} are for {option('int8', True)}: exporting as it is looks at no "
            "texts."
        )
    if not int8 or to is not ExportFormat.OPENVINO:
        return []
    if not is_given:
        raise OptionError(
            f"{option('int8', True)} with openvino measures on texts: give {option('file')}, with lines like the model "
            "will see."
        )
    return texts_of(given, count=CALIBRATION_TEXTS)
