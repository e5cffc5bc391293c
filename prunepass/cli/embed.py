"""The command ``prunepass embed``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from prunepass.bulk.embedder import TOKENS
from prunepass.bulk.engines import PRECISIONS
from prunepass.bulk.files import ENGINES, ROWS, embed_files
from prunepass.bulk.output import Summary
from prunepass.cli.common import err, out, print_json
from prunepass.cli.flags import taking_flags
from prunepass.cli.options import Json
from prunepass.cli.progress import Bars, duration
from prunepass.cli.stopping import again, interruptible
from prunepass.training.data.declare import Declared, at_least, check, one_of

__all__ = ["embed"]


# not within the annotations, which are evaluated elsewhere
_KNOWN_ENGINE = one_of(lambda: ENGINES)
_KNOWN_PRECISION = one_of(lambda: PRECISIONS)


@dataclass(frozen=True)
class EmbedOptions:
    """What `embed_files` takes."""

    folder: Annotated[Path, Declared("Folder that prunepass export wrote, with a tokenizer.", metavar="FOLDER")]
    inputs: Annotated[
        list[Path],
        Declared("Files that end in .parquet, .csv, .jsonl or .txt (a text a line), or folders.", metavar="INPUT"),
    ]
    output: Annotated[Path, Declared("Folder of Parquet to write. It must not exist.", metavar="OUTPUT")]
    column: Annotated[str, Declared("Column of the texts.")] = "text"
    id: Annotated[
        str | None,
        Declared("Column of the ids. Default: id, where all inputs have it; else ids are file:row, from 0."),
    ] = None
    pair: Annotated[str | None, Declared("Column of the second texts, for a model that reads pairs.")] = None
    resume: Annotated[
        bool, Declared("Go on with the run in OUTPUT; begin where there is none.", flags=("--resume",))
    ] = False
    engine: Annotated[str, Declared(f"What runs it: {' or '.join(ENGINES)}.", check=_KNOWN_ENGINE)] = "local"
    workers: Annotated[int, Declared("Processes, or actors of Ray.", check=at_least(1))] = 1
    cpus: Annotated[
        int | None,
        Declared("Threads of each worker. Default: the cores at hand shared out; with Ray 1.", check=at_least(1)),
    ] = None
    max_length: Annotated[
        int | None,
        Declared("Tokens of the longest text. Default: what the folder says that it takes.", check=at_least(1)),
    ] = None
    truncate: Annotated[
        bool, Declared("Cut longer texts; without it they are dead letters.", flags=("--truncate",))
    ] = False
    precision: Annotated[
        str | None,
        Declared(
            f"Of OpenVINO's arithmetic: {', '.join(PRECISIONS)}. Default: its own choice, bf16 on many CPUs.",
            check=_KNOWN_PRECISION,
        ),
    ] = None
    level: Annotated[
        int | None,
        Declared(
            "Which plan of a folder of several: 0 keeps all tokens, 1 is the first. Default: 1.", check=at_least(0)
        ),
    ] = None
    tokens: Annotated[int, Declared("Tokens of a batch, padding included.", check=at_least(1))] = TOKENS
    rows: Annotated[int, Declared("Documents of a Parquet file, at most.", check=at_least(1))] = ROWS

    def __post_init__(self) -> None:
        check(self)


@taking_flags()
def embed(options: EmbedOptions, as_json: Json = False) -> None:
    """Run the texts in files through an exported folder: vectors, labels or scores as Parquet, with their ids."""
    given = asdict(options)
    folder, inputs, output = (given.pop(name) for name in ("folder", "inputs", "output"))
    with interruptible(lambda: f"Files that are whole stay. Go on with {again('--resume')}"), Bars(err) as bars:
        begun = False

        def tell(done: int, documents: int, tokens: int) -> None:
            nonlocal begun
            if not begun:
                begun = True
                bars.begin("embedding", documents, done)
            bars.reach(f"embedding, {_short(tokens)} tokens", done)

        summary = embed_files(folder, inputs, output, **given, on_progress=tell)
    if as_json:
        print_json(asdict(summary))
    else:
        _print(summary, output)
    if summary.wrong and not summary.rows:
        raise typer.Exit(1)  # a script that goes on would find no result


def _print(summary: Summary, output: Path) -> None:
    texts = "1 document" if summary.documents == 1 else f"{summary.documents} documents"
    rate = f", {summary.rows / summary.seconds:.0f} a second" if summary.seconds > 1 else ""
    out.print(
        f"{texts}: {summary.rows} in {output}, {summary.tokens} tokens, {duration(summary.seconds)}{rate}.",
        highlight=False,
        soft_wrap=True,
    )
    if summary.wrong:
        letters = output / "_dead_letters.jsonl"
        err.print(f"{summary.wrong} went wrong; {letters} says why.", highlight=False, soft_wrap=True)
    if summary.duplicates:
        err.print(
            f"{summary.duplicates} have an id that an earlier document has; all of them are in the output.",
            highlight=False,
            soft_wrap=True,
        )
    if summary.repeated:
        err.print(
            f"{summary.repeated} were run more than once, as a process was ended; each is in the output once.",
            highlight=False,
            soft_wrap=True,
        )


def _short(count: int) -> str:
    """``950``, ``1.2k``, ``3.4M``."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
