"""Exported folders that several files run texts through."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported import shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared("encoder", tmp_path_factory)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared("classifier", tmp_path_factory)
