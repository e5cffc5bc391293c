"""Files of texts in, a folder of Parquet out: begun anew, or gone on with after whatever ended it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepass.bulk.embedder import TOKENS, Embedder
from prunepass.bulk.local import run_local
from prunepass.bulk.output import Output, Run, Summary, fingerprint
from prunepass.bulk.progress import Told
from prunepass.bulk.rows import check_same, stretches
from prunepass.bulk.shards import check_pairs
from prunepass.bulk.sources import Columns, files_of, find_sources, pyarrow
from prunepass.errors import DataError, OptionError, option

__all__ = ["ENGINES", "ROWS", "embed_files"]

ENGINES = ("local", "ray")
#: documents of a shard: what a process that is ended loses
ROWS = 8192


def embed_files(
    folder: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    column: str = "text",
    id: str | None = None,
    pair: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    precision: str | None = None,
    level: int | None = None,
    tokens: int = TOKENS,
    rows: int = ROWS,
    resume: bool = False,
    engine: str = "local",
    workers: int = 1,
    cpus: int | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Summary:
    """Run the texts in files through an exported folder and write what comes out as Parquet.

    The output is a folder of ``part-00000.parquet`` and so on, each with a column ``id`` and those of
    `Embedder.columns`, in the order of the input. Each part appears in one step, so a run that was ended, in whatever
    way, is gone on with by ``resume=True``: every id is there once, with the vector that an undisturbed run gives.
    Documents that cannot be run (null, no text, too long for the model, without an id) are in ``_dead_letters.jsonl``,
    with the reason. Readers of Parquet folders pass over names that begin with ``_``. ``_done.json`` is written last.

    Args:
        folder: that `prunepass.export` wrote; see `Embedder`.
        inputs: files that end in .parquet, .csv (UTF-8, with a header), .jsonl, .ndjson or .txt (a text a line; empty
            lines are none), or folders of such.
        output: folder to write. It must not exist or be empty, but with ``resume``.
        column: of the texts.
        id: column of the ids, whole numbers or text. Default: ``id``, where every input has such a column; else
            ``file:row``, with rows from 0.
        pair: column of the second texts, for a model that reads pairs.
        max_length: tokens of the longest text, see `Embedder`.
        truncate: cut longer texts to that; without it they are dead letters.
        precision: of OpenVINO's arithmetic, see `Embedder`.
        level: which plan of a folder of several, see `Embedder`.
        tokens: in a batch, padding included.
        rows: of a part, at most.
        resume: go on with the run in ``output``; it begins where there is none.
        engine: "local", processes on this machine; or "ray", a Ray cluster that shares ``folder``, inputs and output.
        workers: processes, or actors of Ray.
        cpus: threads of each. Default: the cores at hand shared out; with Ray, 1.
        on_progress: is told of documents done, documents in all, and tokens read by this run.

    Raises:
        ExportError: the model's folder is none that runs (see `Embedder`), or the output cannot be written.
        DataError: an input is not there, is of no known kind, lacks a column, or changes meanwhile.
        OptionError: an option that cannot be; the output is taken; ``resume`` for a run with other options.
        MissingExtraError: pyarrow, ray or the runtime is not installed.
        PruneError: the runtime fails, or worker processes end again and again.
    """
    began = time.monotonic()
    pyarrow()
    if engine not in ENGINES:
        raise OptionError(f"There is no {option('engine', engine)}; choose one of {', '.join(ENGINES)}.")
    for name, value in {"rows": rows, "workers": workers, "cpus": cpus}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{option(name)} must be a whole number of at least 1, not {value!r}.")
    if engine == "ray":
        from prunepass.bulk.ray_data import require

        require()
    settings: dict[str, Any] = {
        "max_length": max_length,
        "truncate": truncate,
        "precision": precision,
        "level": level,
        "tokens": tokens,
    }
    columns = Columns(column, pair, id)
    target = Output(Path(output).expanduser())
    _check_place(target.folder, inputs)
    before = _before(target, resume)
    embedder = Embedder(folder, cpus=1, **settings)  # what is wrong with it is said before anything is written
    check_pairs(embedder, pair is not None)
    model = embedder.folder.resolve()
    del embedder
    with target.locked():
        before = _before(target, resume)
        if before is None:
            sources, columns = find_sources([Path(one) for one in inputs], columns)
            shards = list(stretches(sources, rows))
            run = Run(str(model), fingerprint(model), settings, columns, sources, shards)
            target.begin(run)
        else:
            run = before
            _check_same_run(run, settings, columns, fingerprint(model), inputs)
            for source in run.sources:
                check_same(source)
        found = {number: target.counts(number) for number in range(len(run.shards))}
        if None not in found.values() and (summary := target.done()) is not None:
            return summary
        todo = [number for number, counts in found.items() if counts is None]
        told = Told(on_progress, run.documents, sum(c.rows + c.wrong for c in found.values() if c is not None))
        told.begin()
        if todo and engine == "ray":
            from prunepass.bulk.ray_data import run_ray

            run_ray(target, run, todo, workers, cpus, told)
        elif todo:
            run_local(target, todo, workers, cpus, told)
        return target.finish(run, time.monotonic() - began)


def _check_place(output: Path, inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Raises `OptionError` where the output would be among the inputs, or is a file."""
    if not inputs:
        raise OptionError("There is no input: give files or folders of texts.")
    if isinstance(inputs, (str, os.PathLike)):
        raise OptionError(f"Inputs are a list of files and folders, not one: give [{os.fspath(inputs)!r}].")
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output} is a file; give the name of a folder to write.")
    for one in inputs:
        path = Path(one).expanduser()
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise OptionError(f"{output} lies in {path}, which is read; choose a folder elsewhere.")


def _before(target: Output, resume: bool) -> Run | None:
    """The run to go on with. Raises `OptionError` where there is one and nothing is said of it."""
    before = target.read()
    if before is not None and not resume:
        state = "has finished" if target.done() is not None else "was broken off"
        raise OptionError(
            f"{target.folder} holds a run that {state}. Choose another folder, or go on with it by "
            f"{option('resume', True)}."
        )
    return before


def _check_same_run(
    run: Run, settings: Mapping[str, Any], columns: Columns, digest: str, inputs: Sequence[str | os.PathLike[str]]
) -> None:
    """Raises `OptionError` where a run is gone on with by other options: vectors would not be of one kind; `DataError`
    where a folder holds a file that it did not."""
    if run.digest != digest:
        raise OptionError(f"The run was begun with the model in {run.model}, and this is another one.")
    for name, value in settings.items():
        if run.settings.get(name) != value:
            raise OptionError(
                f"The run was begun with {option(name, run.settings.get(name))}; go on with the same, or choose "
                "another output."
            )
    if (run.columns.text, run.columns.pair) != (columns.text, columns.pair) or (
        columns.id is not None and run.columns.id != columns.id
    ):
        raise OptionError(
            f"The run was begun with the columns {', '.join(run.columns.names)}; go on with the same, or choose "
            "another output."
        )
    known = {source.path for source in run.sources}
    for one in inputs:
        path = Path(one).expanduser().resolve()
        if not any(Path(name).is_relative_to(path) for name in known):
            raise OptionError(f"The run was begun without {one}; go on with the same inputs, or choose another output.")
        if path.is_dir() and (new := sorted({file.path for file in files_of(path)} - known)):
            raise DataError(
                f"{new[0]} was not there when the run began. Take it out of {one}, or embed it into another output."
            )
