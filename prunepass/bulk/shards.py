"""One shard: its rows read, run and written. The unit that a worker does, and does again if its process was ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prunepass.bulk.embedder import Embedder
from prunepass.bulk.output import Counts, Output, Run
from prunepass.bulk.rows import Row, read
from prunepass.bulk.sources import pyarrow
from prunepass.errors import OptionError, option

if TYPE_CHECKING:
    from prunepass.bulk.engines import Array

__all__ = ["check_pairs", "open_embedder", "run_shard"]


def open_embedder(run: Run, cpus: int | None) -> Embedder:
    """The model of a run on so many threads. Raises as `Embedder`."""
    embedder = Embedder(run.model, cpus=cpus, **run.settings)
    check_pairs(embedder, run.columns.pair is not None)
    return embedder


def check_pairs(embedder: Embedder, given: bool) -> None:
    """Raises `OptionError` where the model reads pairs and is not given them, or the other way round."""
    if embedder.pairs and not given:
        raise OptionError(
            f"The model in {embedder.folder} scores pairs of texts: {option('column')} names one and {option('pair')} "
            "the other."
        )
    if given and not embedder.pairs:
        raise OptionError(f"The model in {embedder.folder} reads single texts; leave out {option('pair')}.")


def run_shard(
    embedder: Embedder,
    run: Run,
    output: Output,
    number: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Counts:
    """Read, run and write a shard.

    Raises:
        DataError: a file that is read has changed.
        PruneError: the runtime fails.
        ExportError: the disk is full, or refuses.
    """
    mark = output.mark(number)
    try:
        rows = list(read(run.sources, run.columns, run.shards[number]))
        fine = [row for row in rows if row.wrong is None]
        attempt = embedder.attempt([row.text for row in fine], on_progress)
        letters = [_letter(row, row.wrong) for row in rows if row.wrong is not None]
        letters += [_letter(fine[i], reason) for i, reason in sorted(attempt.wrong.items())]
        kept = [i for i in range(len(fine)) if i not in attempt.wrong]
        kind = run.sources[0].ids
        table = _table(embedder, [fine[i].id for i in kept], kind, attempt.outputs[kept])
        return output.write(number, table, sorted(letters, key=_place), attempt.tokens, mark)
    except BrokenPipeError:  # nobody hears of the progress any more: the run was ended
        raise
    except Exception:
        mark.unlink(missing_ok=True)  # one that stays tells of a process that was ended
        raise


def _letter(row: Row, reason: str | None) -> dict[str, Any]:
    return {"id": row.id, "file": row.file, "row": row.number, "reason": reason, "text": _as_json(row.text)}


def _as_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_as_json(one) for one in value]
    return value if value is None or isinstance(value, (str, bool, int, float, dict)) else str(value)


def _place(letter: Mapping[str, Any]) -> tuple[str, int]:
    return letter["file"], letter["row"]


def _table(embedder: Embedder, ids: list[Any], kind: str, outputs: Array) -> Any:
    """Columns ``id`` and those of `Embedder.columns`."""
    pa = pyarrow()
    columns: dict[str, Any] = {"id": pa.array(ids, getattr(pa, kind)())}
    for name, values in embedder.columns(outputs).items():
        if values.ndim == 2:
            flat = pa.array(values.reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            columns[name] = pa.array(values.tolist(), pa.string() if name == "label" else pa.float32())
    return pa.table(columns)
