"""Folders to write: what is refused before any work, and that a check leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prunepass.errors import ExportError, OptionError
from prunepass.folders import as_path, check_writable


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
