"""Plans on disk: a folder with the plan as JSON and its predictors as safetensors. Some come with the package.

Saving never leaves half a plan, nor the weights of one beside the JSON of another. The new weights first get a name
that holds the digest of their JSON, then the JSON is replaced in one step, then the weights get their usual name. A
reader takes the weights of the JSON's digest where there are any, so that it sees the old plan until that one step, and
the new one from then on, also where the writer ended in between.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prunepass.errors import OptionError, PlanError, WeightsError
from prunepass.plan.folders import check_writable, sync, sync_folder, usual_modes, writing
from prunepass.plan.strict_json import MAX_BYTES
from prunepass.plan.weights import Planned, load, save

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLAN_FILE", "WEIGHTS_FILE", "read", "shipped", "write"]

PLAN_FILE = "prunepass.json"
WEIGHTS_FILE = "predictors.safetensors"
_SHIPPED = Path(__file__).parent / "predictors"
_UNSETTLED = re.compile(r"predictors-[0-9a-f]{16}\.safetensors")
P = TypeVar("P", bound=Planned)
#: how often a plan is read again that another process replaces meanwhile
_TRIES = 5


def shipped() -> tuple[str, ...]:
    """Names of the plans that come with the package, each with predictors trained for one model.

    ``"all-MiniLM-L6-v2"`` costs 0.55 of the dense FLOPs; names with a budget after it, such as
    ``"all-MiniLM-L6-v2/budgets/0.4"``, are plans for other shares, and ``"all-MiniLM-L6-v2/predictors"`` holds a
    predictor for each block, to search with.
    """
    return tuple(sorted(str(f.parent.relative_to(_SHIPPED).as_posix()) for f in _SHIPPED.rglob(PLAN_FILE)))


# -- writing ---------------------------------------------------------------------------------------------------------


def write(plan: Planned, folder: Path) -> None:
    """Write ``prunepass.json`` and, where there are trained weights, ``predictors.safetensors``.

    Whatever else lies in the folder stays. Where anything fails, the plan that lay there stays as it was.

    Raises:
        OptionError: a file stands in the folder's place, or a folder or a read-only file in that of one of the two.
        ExportError: the disk is full, or refuses.
        WeightsError: the weights do not fit the plan's stages, or hold NaN or infinity.
    """
    text = plan.to_json().encode()
    digest = hashlib.sha256(text).hexdigest()
    check_writable(folder, needed_bytes=sum(w.numel() * w.element_size() for w in plan.weights.values()))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PLAN_FILE, WEIGHTS_FILE):
            _check_replaceable(folder / name)
        with _locked(folder), tempfile.TemporaryDirectory(prefix=".prunepass-", dir=folder) as temporary:
            fresh = Path(temporary) / "new"
            fresh.mkdir()
            if plan.weights or _weights_files(folder):
                save(plan, fresh / WEIGHTS_FILE, digest)
            (fresh / PLAN_FILE).write_bytes(text)
            usual_modes(fresh)
            sync(fresh)
            _put_in_place(plan, fresh, folder, _unsettled(folder, digest))
            sync_folder(folder)


def _put_in_place(plan: Planned, fresh: Path, folder: Path, unsettled: Path) -> None:
    """The three steps. Without weights, a file of none stands for them until those of the old plan are gone."""
    if (fresh / WEIGHTS_FILE).is_file():
        (fresh / WEIGHTS_FILE).replace(unsettled)
        sync_folder(folder)
    (fresh / PLAN_FILE).replace(folder / PLAN_FILE)
    sync_folder(folder)
    if plan.weights:
        unsettled.replace(folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    for left in _weights_files(folder):
        if left.name != WEIGHTS_FILE:
            left.unlink(missing_ok=True)


def _check_replaceable(file: Path) -> None:
    if file.is_dir():
        raise OptionError(f"{file} is a folder, where a file of the plan is to be. Choose another folder.")
    if file.is_file() and not stat.S_IMODE(file.stat().st_mode) & stat.S_IWUSR:
        raise OptionError(f"{file} is read-only. Make it writable, or choose another folder.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where the system can lock folders; its end, however it comes, frees the lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unsettled(folder: Path, digest: str) -> Path:
    return folder / f"predictors-{digest[:16]}.safetensors"


def _weights_files(folder: Path) -> list[Path]:
    """The weights of the plan in a folder, and what interrupted savings have left."""
    return [f for f in folder.iterdir() if f.name == WEIGHTS_FILE or _UNSETTLED.fullmatch(f.name)]


# -- reading ---------------------------------------------------------------------------------------------------------


def read(place: Path, make: Callable[[str, Mapping[str, Tensor]], P]) -> P:
    """The plan in a folder, or in a JSON file, or of a name of `shipped`.

    Args:
        place: where to look.
        make: gives the plan of a JSON text and its weights.

    Raises:
        PlanError: there is none, or its JSON is wrong; the message names the file.
        WeightsError: the weights file is damaged, was not written by prunepass or does not fit the plan.
    """
    file = _find(place)
    text, again = _read_bytes(file), b""
    for _ in range(_TRIES):
        try:
            plan, error = _read(file, text, make), None
        except PlanError as e:
            plan, error = None, e
        again = _read_bytes(file)
        if again == text:
            break
        text = again  # saved anew meanwhile: the weights read may be those of either plan
    if error is not None:
        raise error
    assert plan is not None
    return plan


def _find(place: Path) -> Path:
    for file in _candidates(place):
        try:
            if file.is_file():
                return file
            if file.exists():
                what = "a folder" if file.is_dir() else "no regular file"
                raise PlanError(f"{file} is {what}, where the JSON of a plan is to be.")
        except (OSError, ValueError) as e:
            raise PlanError(f"{file} cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    raise PlanError(
        f"There is no plan at {place}: expected a folder that holds {PLAN_FILE}, or the name of a plan that comes "
        f"with prunepass: {', '.join(shipped())}."
    )


def _candidates(place: Path) -> list[Path]:
    """Where the plan's JSON may stand; a folder of the user's, even without a plan, goes before a name of ours."""
    if os.path.isdir(place):
        return [place / PLAN_FILE]
    return [place] if place.anchor or ".." in place.parts else [place, _SHIPPED / place / PLAN_FILE]


def _read_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise PlanError(f"{file} is {size / 1e6:.0f} MB large, which no plan is. It was not read.")
            return stream.read(MAX_BYTES + 1)
    except OSError as e:
        raise PlanError(f"{file} cannot be read: {e.strerror or e}.") from None


def _read(file: Path, text: bytes, make: Callable[[str, Mapping[str, Tensor]], P]) -> P:
    try:
        decoded = text.decode("utf-8-sig")
        plan = make(decoded, {})
    except UnicodeDecodeError as e:
        line = text.count(b"\n", 0, e.start) + 1
        raise PlanError(f"{file} is not UTF-8: line {line} cannot be decoded ({e.reason}). Save it as UTF-8.") from None
    except PlanError as e:
        raise PlanError(f"{file}: {e}") from None
    weights = _weights(plan, file.parent, hashlib.sha256(text).hexdigest())
    return make(decoded, weights) if weights else plan


def _weights(plan: Planned, folder: Path, digest: str) -> dict[str, Tensor]:
    """Those written with the JSON of this digest, or those of the usual name."""
    with suppress(FileNotFoundError):
        return load(plan, _unsettled(folder, digest))[0]
    file = folder / WEIGHTS_FILE
    if file.is_dir():
        raise WeightsError(f"{file} is a folder, where the weights of a plan are to be.")
    try:
        weights, written_with = load(plan, file)
    except FileNotFoundError:
        return {}
    # a JSON changed by hand goes with the weights beside it, unless there is more than one file of them
    if written_with not in (None, digest) and len(_weights_files(folder)) > 1:
        names = " or ".join(f.name for f in _weights_files(folder))
        raise WeightsError(
            f"It is not clear which weights belong to the plan in {folder}: saving was interrupted, and {PLAN_FILE} "
            f"was changed after it. Save the plan again, or remove {names}."
        )
    return weights
