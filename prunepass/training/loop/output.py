"""The folder that training or search writes: refused early where it is taken, and never left half written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

from prunepass.errors import OptionError, option
from prunepass.plan.folders import check_writable, usual_modes

__all__ = [
    "OUTCOME_FILE",
    "check_checkpoints",
    "check_free",
    "check_space",
    "checkpoints_of",
    "clear_checkpoints",
    "last_checkpoint",
    "new_folder",
    "step_of",
]

#: figures of a run that has finished, and all that is needed to repeat it
OUTCOME_FILE = "prunepass_run.json"
_STATE_FILE = "trainer_state.json"


def check_free(folder: Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise where ``folder`` cannot be written, or must not be.

    Args:
        overwrite: whether a folder that is not empty may be replaced.
        inputs: what is read, as far as it lies on this machine; a folder that holds any of it is never replaced.

    Raises:
        OptionError: it is taken.
        ExportError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file; give the name of a folder to write.")
    check_writable(folder.absolute().parent)  # a new folder is made beside it
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite and (folder / OUTCOME_FILE).is_file():
        raise OptionError(
            f"{folder} holds a run that has finished. Choose another folder, or replace it with "
            f"{option('overwrite', True)}."
        )
    if not overwrite:
        raise OptionError(
            f"{folder} exists and is not empty. Choose another folder, or replace it with {option('overwrite', True)}."
        )
    for name in inputs:
        path = None if name is None else Path(name).expanduser().resolve()
        if path is not None and path.exists() and path.is_relative_to(folder.resolve()):
            raise OptionError(f"{folder} holds {name}, which is read; choose another folder to write.")


def checkpoints_of(folder: Path) -> Path:
    """Where checkpoints go while ``folder`` is in the making: ``folder.checkpoints`` beside it."""
    folder = folder.absolute()  # "." and ".." have no name
    return folder.with_name(f"{folder.name}.checkpoints")


def check_space(folder: Path, model: nn.Module, *, frozen: bool, checkpoints: int) -> None:
    """Raise where the disk has no room for what training writes: so many checkpoints at a time, and the folder.

    A checkpoint holds the weights and two numbers of the optimiser for each.

    Raises:
        ExportError: too little space is left.
    """
    weights = 0 if frozen else sum(p.numel() * p.element_size() for p in model.parameters())
    check_writable(checkpoints_of(folder), needed_bytes=(3 * checkpoints + 1) * weights)


def check_checkpoints(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `OptionError` where checkpoints of an earlier run lie there and nothing is said of them.

    A later ``resume`` might take up a checkpoint of the wrong run.
    """
    if _steps(folder) and not resume and not overwrite:
        raise OptionError(
            f"{checkpoints_of(folder)} holds checkpoints of an earlier run. Go on from them with "
            f"{option('resume', True)}, or replace them with {option('overwrite', True)}."
        )


def last_checkpoint(folder: Path) -> Path:
    """The newest of the checkpoints ``checkpoint-<step>`` that belong to ``folder``.

    Raises:
        OptionError: there is none to go on from.
    """
    # the Trainer writes its state last: a checkpoint without it was cut short
    steps = {number: p for number, p in _steps(folder).items() if (p / _STATE_FILE).is_file()}
    if not steps:
        raise OptionError(
            f"There is no checkpoint in {checkpoints_of(folder)} to resume from; leave out "
            f"{option('resume')} to start anew."
        )
    return steps[max(steps)]


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints that belong to ``folder``, and nothing else that lies beside them."""
    for checkpoint in _steps(folder).values():
        shutil.rmtree(checkpoint)
    with suppress(OSError):  # it is not there, or something else lies in it
        checkpoints_of(folder).rmdir()


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def _steps(folder: Path) -> dict[int, Path]:
    found = ((p.name.removeprefix("checkpoint-"), p) for p in checkpoints_of(folder).glob("checkpoint-*"))
    return {int(number): p for number, p in found if number.isdigit() and p.is_dir()}


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place if all goes well, and vanishes if not.

    What stood there before (only with ``overwrite``) is removed once the new one stands in its place.
    """
    check_free(folder, overwrite=overwrite)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fresh, old = work / "new", work / "old"
    fresh.mkdir()
    try:
        yield fresh
        usual_modes(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
