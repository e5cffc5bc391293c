"""docs/guides/one-new-file.md: each diff is one new file and one test file, and nothing else is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks

PAGE = ROOT / "docs" / "guides" / "one-new-file.md"
FOLDERS = ("prunepass/scorers", "prunepass/passes", "backends", "benchmarks/tasks")
_FILE = re.compile(r"^diff --git a/(\S+) b/\1\nnew file mode 100644\n--- /dev/null\n\+\+\+ b/\1\n@@", re.MULTILINE)


def diffs() -> list[str]:
    return [block.code for block in blocks(PAGE, "diff")]


def added() -> list[str]:
    """The files that the diffs make."""
    return [path for code in diffs() for path in _FILE.findall(code)]


def test_each_is_one_new_file_and_one_test_file() -> None:
    assert sum(code.count("diff --git") for code in diffs()) == len(added()) == 2 * len(FOLDERS)
    for folder, path, test in zip(FOLDERS, added()[::2], added()[1::2], strict=True):
        assert Path(path).parent == Path(folder)
        assert Path(test).parts[0] == "tests"
        assert Path(test).name == f"test_{Path(path).name}"
        assert not (ROOT / path).exists()


@pytest.mark.slow
def test_their_tests_pass_in_a_copy_of_the_repository(tmp_path: Path) -> None:
    for folder in ("prunepass", "backends", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (tmp_path / "prunepass" / "backends").symlink_to(tmp_path / "backends")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    diff = "".join(code if code.endswith("\n") else f"{code}\n" for code in diffs())
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    twins = "tests/passes/test_contracts.py::test_each_pass_is_a_frozen_dataclass_with_a_contract_and_a_twin"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added()[1::2], "tests/test_rooms.py", twins],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ruff = [sys.executable, "-m", "ruff"]
    for command in ([*ruff, "check", *added()], [*ruff, "format", "--check", *added()]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
