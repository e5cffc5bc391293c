"""The project file says what is there: every package, every entry point."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_packaged() -> None:
    on_disk = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "prunepass").rglob("__init__.py")} | {
        "prunepass.backends"
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_entry_points_lead_somewhere() -> None:
    places = [
        *PROJECT["project"]["scripts"].values(),
        *PROJECT["project"]["entry-points"]["torch_dynamo_backends"].values(),
    ]
    for place in places:
        module, name = place.split(":")
        assert callable(getattr(import_module(module), name))


def test_the_base_install_is_torch_and_networkx() -> None:
    names = sorted(requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"])
    assert names == ["networkx", "torch"]


@pytest.mark.parametrize("extra", ["openvino", "onnx", "hf", "train", "viz", "cli", "dev", "all"])
def test_the_extras_named_in_messages_exist(extra: str) -> None:
    assert extra in PROJECT["project"]["optional-dependencies"]
