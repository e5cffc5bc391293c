"""The command line, ``prunepass explain | export | bench | train | search``. It calls what scripts can call as well."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

import prunepass
from prunepass.cli.common import clear_errors, err, out, print_json, working
from prunepass.cli.progress import Bars
from prunepass.cli.texts import docstrings, lengths_in_words
from prunepass.cli.train import search, train
from prunepass.errors import OptionError, PlanError
from prunepass.export.folder import check_folder
from prunepass.export.hub import Loaded, load
from prunepass.generation.stateful import generates
from prunepass.plan.choice import DEFAULT, choose
from prunepass.plan.folders import check_file
from prunepass.report.bench import Batch, BenchResult, bench

if TYPE_CHECKING:
    from prunepass.plan.annotations import Restore

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
#: that `explain` traces the model with; lengths are taken of all texts
EXAMPLE_TEXTS = 8


class ExportFormat(StrEnum):
    """What a pruned model can be written as."""

    OPENVINO = "openvino"
    ONNX = "onnx"
    PT2 = "pt2"


ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face model, or its name on the hub.")
]
PlanOpt = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help="Folder of a saved plan, name of one that comes along, or 'default' for the training-free one. "
        "Default: the plan in MODEL's folder, or else the training-free one.",
    ),
]
KeepOpt = Annotated[
    str | None,
    typer.Option(
        help="Instead of --plan. A list has one number a layer, each a share of the row's original tokens (0.7,0.5). "
        "One number is the share of the tokens that reach a layer: 0.5 at two layers leaves 1/2, then 1/4."
    ),
]
LayersOpt = Annotated[str | None, typer.Option(help="With --keep: 0-based blocks to prune before, such as 2,4.")]
ScorerOpt = Annotated[str | None, typer.Option(help="With --keep: how tokens are scored. Default: attention.")]
RestoreOpt = Annotated[
    str | None,
    typer.Option(
        help="With --keep: what outputs carry at pruned positions: last (the state that the token left with), mean (of "
        "the tokens kept: for mean-pooled embeddings) or zeros. Default: last."
    ),
]
TextOpt = Annotated[list[str] | None, typer.Option("--text", help="Input text; may be given more than once.")]
FileOpt = Annotated[
    Path | None,
    typer.Option(
        "--file", help="UTF-8 file with one text a line. Default input: the docstrings of installed packages."
    ),
]
LengthOpt = Annotated[int | None, typer.Option("--max-length", min=1, help="Cut texts to this many tokens.")]
DtypeOpt = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")]
TargetOpt = Annotated[str | None, typer.Option(help="Runtime whose fusions are counted: inductor, openvino, ...")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, to stdout.")]


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
def explain(
    model: ModelArg,
    plan: PlanOpt = None,
    keep: KeepOpt = None,
    layers: LayersOpt = None,
    scorer: ScorerOpt = None,
    restore: RestoreOpt = None,
    text: TextOpt = None,
    file: FileOpt = None,
    max_length: LengthOpt = None,
    target: TargetOpt = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    dtype: DtypeOpt = "float32",
    as_json: JsonOpt = False,
) -> None:
    """Show the blocks found, what each keeps, the FLOPs saved, and what would be refused and why."""
    with clear_errors():
        if html is not None:
            check_file(html)
        texts = _texts(text, file)
        with working("loading and tracing"):
            loaded = load(model, dtype=dtype)
            chosen = _plan(loaded, plan, keep, layers, scorer, restore)
            inputs = loaded.encode(texts[:EXAMPLE_TEXTS], max_length=max_length)
            lengths = loaded.lengths(texts, max_length=max_length)
            report = prunepass.explain(
                loaded.model,
                chosen,
                inputs,
                target=target,
                lengths=lengths,
                tokenizer=loaded.tokenizer,
                text=texts[0],
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
def export(
    model: ModelArg,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write. It must not exist or be empty.")],
    to: Annotated[ExportFormat, typer.Option(help="Format of the exported model.")] = ExportFormat.OPENVINO,
    plan: PlanOpt = None,
    keep: KeepOpt = None,
    layers: LayersOpt = None,
    scorer: ScorerOpt = None,
    restore: RestoreOpt = None,
    length: Annotated[int | None, typer.Option(min=1, help="Fix the length; it stays dynamic otherwise.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Fix the batch size; it stays dynamic otherwise.")] = None,
    dtype: DtypeOpt = "float32",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise; with openvino, ranges come from --file.")] = False,
    text: Annotated[list[str] | None, typer.Option("--text", help="With --int8: a text to calibrate on.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="With --int8: UTF-8 file, one text a line.")] = None,
    stateful: Annotated[
        bool | None,
        typer.Option(
            "--stateful/--no-stateful",
            help="Whether the key-value cache is inside; by default for a model that generates, to openvino.",
        ),
    ] = None,
) -> None:
    """Write the pruned model so that the runtime alone runs it: OpenVINO IR, ONNX, or a torch.export program."""
    with clear_errors():
        folder = check_folder(folder)
        texts = _calibration_texts(to, int8, text, file)
        with working("loading, pruning and converting"):
            loaded = load(model, dtype=dtype)
            choice = choose(_plan(loaded, plan, keep, layers, scorer, restore), loaded.model)
            prunepass.export(
                loaded.model,
                choice.plan or DEFAULT,
                folder,
                to=to.value,
                tokenizer=loaded.tokenizer,
                length=length,
                batch=batch,
                int8=loaded.batches(texts, rows=batch or 1, length=length) if texts else int8,
                stateful=stateful,
            )
        err.print(f"Pruned by {choice.source}.", highlight=False, soft_wrap=True)
        for written in sorted(p for p in folder.rglob("*") if p.is_file()):
            out.print(f"{written}  {written.stat().st_size / 1e6:.2f} MB", highlight=False, soft_wrap=True)


@app.command(name="bench")
def bench_command(
    model: ModelArg,
    target: Annotated[str, typer.Option(help="inductor, openvino, onnxruntime or eager.")] = "inductor",
    plan: PlanOpt = None,
    keep: KeepOpt = None,
    layers: LayersOpt = None,
    scorer: ScorerOpt = None,
    restore: RestoreOpt = None,
    text: TextOpt = None,
    file: FileOpt = None,
    texts: Annotated[int, typer.Option(min=1, help="How many texts to take.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds over all texts.")] = 10,
    max_length: LengthOpt = None,
    config: Annotated[
        list[str] | None, typer.Option(help="Setting of the runtime as KEY=VALUE; may be given more than once.")
    ] = None,
    dtype: DtypeOpt = "float32",
    as_json: JsonOpt = False,
) -> None:
    """Time the dense and the pruned model in turn on one target, and compare what they put out."""
    with clear_errors():
        chosen_texts = _texts(text, file, count=texts)[:texts]
        settings = _settings(config)
        with working("loading"):
            loaded = load(model, dtype=dtype)
        chosen = _plan(loaded, plan, keep, layers, scorer, restore)
        batches: list[Batch] = [
            loaded.encode(chosen_texts[i : i + batch_size], max_length=max_length)
            for i in range(0, len(chosen_texts), batch_size)
        ]
        with Bars(err) as bars:
            bars.begin("compiling", len(batches) * (repeats + 1))
            result = bench(
                loaded.model,
                chosen,
                batches,
                target=target,
                repeats=repeats,
                config=settings,
                on_step=bars.step,
            )
        if as_json:
            print_json({"model": model, **result.to_dict()})
        else:
            _print_bench(result)


app.command()(train)
app.command()(search)


# -- from options to objects -----------------------------------------------------------------------------------------


def _plan(
    loaded: Loaded, plan: str | None, keep: str | None, layers: str | None, scorer: str | None, restore: str | None
) -> prunepass.PrunePlan | str | None:
    """What the options say of a plan, for `choice.choose`; None where they say nothing."""
    short = {"--keep": keep, "--layers": layers, "--scorer": scorer, "--restore": restore}
    given = [name for name, value in short.items() if value is not None]
    if plan is not None:
        if given:
            raise OptionError(f"--plan already says everything; leave out {', '.join(given)}.")
        return plan
    if not given:
        return None
    if keep is None or layers is None:
        raise OptionError("Give --keep and --layers together, such as: --keep 0.7,0.5 --layers 2,4")
    blocks = [_whole_number(part) for part in layers.split(",")]
    shares: Any = keep.split(",") if "," in keep else keep
    chosen = prunepass.PrunePlan.short(
        shares, blocks, scorer or "attention", restore=cast("Restore", restore or "last")
    )
    return _protecting_last(chosen, loaded)


def _protecting_last(plan: prunepass.PrunePlan, loaded: Loaded) -> prunepass.PrunePlan:
    """A model that generates predicts the next token from the last one."""
    if not generates(loaded.model):
        return plan
    return replace(plan, protect=replace(plan.protect, last=1))


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--layers must be block numbers such as 2,4; {text.strip()!r} is none.") from None


def _texts(given: list[str] | None, file: Path | None, *, count: int | None = None) -> list[str]:
    """The texts given, or those of the file; of a file ``count``, where that is given. Else some docstrings."""
    if given and file is not None:
        raise OptionError("Give --text or --file, not both.")
    if given:
        return given
    if file is None:
        found = list(docstrings(minimum_characters=1500).values())
        wanted = count or EXAMPLE_TEXTS
        return found[:: max(1, len(found) // wanted)][:wanted]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"{file} cannot be read as UTF-8 text: {e}") from None
    texts = [line for line in lines if line]
    if not texts:
        raise OptionError(f"{file} has no text in it.")
    return texts[:count]


def _calibration_texts(to: ExportFormat, int8: bool, given: list[str] | None, file: Path | None) -> list[str]:
    if not int8 and (given or file is not None):
        raise OptionError("--text and --file are for --int8: exporting as it is looks at no texts.")
    if not int8 or to is not ExportFormat.OPENVINO:
        return []
    if not given and file is None:
        raise OptionError("--int8 with openvino measures on texts: give --file, with lines like the model will see.")
    return _texts(given, file, count=CALIBRATION_TEXTS)


def _settings(pairs: list[str] | None) -> dict[str, str]:
    settings = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"--config takes KEY=VALUE, not {pair!r}.")
        settings[key] = value
    return settings


# -- output ----------------------------------------------------------------------------------------------------------


def _print_bench(result: BenchResult) -> None:
    table = Table(title=f"{result.target}, {result.texts} texts in {result.batches} batches")
    for name in ("", "p50 ms", "p95 ms", "texts/s"):
        table.add_column(name, justify="left" if not name else "right")
    for name, timing in (("dense", result.dense), ("pruned", result.pruned)):
        table.add_row(name, f"{timing.p50:.2f}", f"{timing.p95:.2f}", f"{timing.texts_per_second:.1f}")
    out.print(table)
    out.print(f"plan: {result.plan_source}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"computed in {result.precision}", highlight=False, markup=False, soft_wrap=True)
    ratios = "  ".join(f"{kind.replace('_', ' ')} {ratio:.2f}" for kind, ratio in result.flops_ratio.items())
    out.print(f"speedup (p50) {result.speedup:.2f}", highlight=False)
    if ratios:
        out.print(f"fewer FLOPs, by denominator: {ratios}", highlight=False)
    if result.slower_up_to is not None:
        short = [timing for timing in result.by_batch if timing.length <= result.slower_up_to]
        more = sum(timing.pruned for timing in short) / sum(timing.dense for timing in short)
        batches = "1 batch takes" if len(short) == 1 else f"{len(short)} batches take"
        out.print(
            f"[yellow]Pruning does not pay here for texts of up to {result.slower_up_to} tokens:[/yellow] their "
            f"{batches} {more:.2f} times as long as unpruned. Leave such texts to the unpruned model, "
            "put more of them into one call, or give the plan fewer stages.",
            highlight=False,
        )
    agreement = Table(title="pruned against dense")
    for name in ("output", "cosine", "cosine, mean of tokens", "largest difference"):
        agreement.add_column(name, justify="left" if name == "output" else "right")
    for row in result.agreement:
        pooled = "" if row.pooled_cosine is None else f"{row.pooled_cosine:.4f}"
        agreement.add_row(row.output, f"{row.cosine:.4f}", pooled, f"{row.max_difference:.3g}")
    out.print(agreement)
    if result.advice is not None:
        out.print(f"[yellow]Note:[/yellow] {escape(result.advice)}", highlight=False, soft_wrap=True)
