"""Folders to write: what is refused before any work, and that a check leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunepass.errors import ExportError, OptionError
from prunepass.plan.folders import as_path, check_file, check_writable, filled, writing


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", ["out", "a/b/c", "with spaces", "mëßig ünicode"])
def test_a_folder_that_can_be_written_passes_and_is_not_made(name: str, tmp_path: Path) -> None:
    check_writable(tmp_path / name, needed_bytes=1)
    assert names(tmp_path) == []


def test_relative_names_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (Path("out"), Path("."), Path("~/out")):
        check_writable(place)
    assert as_path("~/out") == tmp_path / "home" / "out"
    assert names(tmp_path) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match=r"file is a file, not a folder\. Give"):
        check_writable(tmp_path / "file")
    with pytest.raises(OptionError, match=r"file is a file, not a folder, so .*deeper cannot be made in it"):
        check_writable(tmp_path / "file" / "deep" / "deeper")


def test_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    check_writable(tmp_path / "link" / "out")
    with pytest.raises(OptionError, match="a link to nowhere"):
        check_writable(tmp_path / "broken")
    with pytest.raises(ExportError, match="cannot be written: Too many levels"):
        check_writable(tmp_path / "loop")


@pytest.mark.parametrize("name", ["a\0b", 3, None])
def test_names_that_no_folder_can_have(name: Any) -> None:
    with pytest.raises(OptionError, match="is not the name of a folder"):
        check_writable(name)


def test_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_refuses_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As immutable folders, missing permissions and read-only mounts do."""

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    words = rf"out cannot be written, because {tmp_path} cannot be: {os.strerror(number)}\. Choose another folder"
    with pytest.raises(ExportError, match=words):
        check_writable(tmp_path / "out")
    with pytest.raises(ExportError, match=rf"{tmp_path} cannot be written: {os.strerror(number)}"):
        check_writable(tmp_path)


def test_a_full_disk_that_still_takes_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ExportError, match="No space left"):
        check_writable(tmp_path / "out")
    assert names(tmp_path) == []


def test_too_little_space(tmp_path: Path) -> None:
    left = shutil.disk_usage(tmp_path).free
    with pytest.raises(ExportError, match=r"out needs .* of space, but the disk of .* has .*B left\. Make room"):
        check_writable(tmp_path / "out", needed_bytes=2 * left + 1)


# -- folders that appear whole or not at all ---------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "one").write_text("1")
    (folder / "deep").mkdir()
    (folder / "deep" / "two").write_text("2")
    (folder / "deep" / "two").chmod(0o600)


def filling(folder: Path, meanwhile: Callable[[], None]) -> None:
    with filled(folder) as fresh:
        fill(fresh)
        meanwhile()


def test_a_filled_folder_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            with filled(tmp_path / "a" / str(mask)) as folder:
                assert not (tmp_path / "a" / str(mask)).exists()
                fill(folder)
        finally:
            os.umask(before)
        made = tmp_path / "a" / str(mask)
        assert names(made) == ["deep", "deep/two", "one"]
        assert [made.stat().st_mode & 0o777, (made / "deep" / "two").stat().st_mode & 0o777] == [
            0o777 & ~mask,
            0o666 & ~mask,
        ]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([str(0o022), str(0o077)])


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_folder_that_is_not_finished_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = names(tmp_path)

    def fail() -> None:
        raise error

    for name in ("a/b/c", "empty"):
        with pytest.raises(type(error)):
            filling(tmp_path / name, fail)
        assert names(tmp_path) == before


def test_errors_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=rf"^{tmp_path / 'out' / 'x'} could not be written: No space left"),
        filled(tmp_path / "out") as folder,
        writing(folder / "x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_empty_folders_and_links_to_them_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with filled(tmp_path / "link") as folder:
        fill(folder)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "empty") == ["deep", "deep/two", "one"]


@pytest.mark.parametrize("why", ["a disk of its own", "nothing can be made beside it"])
def test_a_folder_that_cannot_be_replaced_is_filled_in_its_place(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    make = tempfile.mkdtemp

    def beside(**options: Any) -> str:
        if options["dir"] == tmp_path:
            raise OSError(errno.EACCES, "Permission denied")
        return make(**options)

    if why == "a disk of its own":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    else:
        monkeypatch.setattr(tempfile, "mkdtemp", beside)
    with filled(target) as folder:
        assert folder.is_relative_to(target)
        fill(folder)
    assert names(tmp_path) == ["mounted", "mounted/deep", "mounted/deep/two", "mounted/one"]


def test_a_folder_filled_meanwhile_by_another_is_left_alone(tmp_path: Path) -> None:
    def other() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(ExportError, match="not empty"):
        filling(tmp_path / "out", other)
    assert names(tmp_path) == ["out", "out/mine"]


def test_a_file_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_file(tmp_path / "a" / "report.html")
    (tmp_path / "old.html").write_text("old")
    check_file(tmp_path / "old.html")
    assert (tmp_path / "old.html").read_text() == "old"
    with pytest.raises(OptionError, match="is a folder"):
        check_file(tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ExportError, match=r"old\.html cannot be written: Permission denied"):
        check_file(tmp_path / "old.html")


def test_a_trained_folder_has_the_modes_of_the_umask(tmp_path: Path) -> None:
    from prunepass.training.loop.output import new_folder

    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "out") as folder:
            fill(folder)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "deep" / "two").stat().st_mode & 0o777 == 0o644
