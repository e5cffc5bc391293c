"""The text that every machine has."""

from __future__ import annotations

import pytest

from prunepass.cli.texts import docstrings


def test_texts_are_long_named_and_without_repeats() -> None:
    found = docstrings(["torch.nn", "torch.linalg"], minimum_characters=1000)
    assert "torch.linalg.svd" in found
    assert "torch.nn.MultiheadAttention" in found
    assert len(set(found.values())) == len(found)
    assert min(map(len, found.values())) >= 1000


def test_limit_and_missing_modules() -> None:
    assert len(docstrings(["no_such_module", "torch.nn"], limit=5)) == 5
    assert docstrings(["no_such_module"]) == {}


@pytest.mark.filterwarnings("error")
def test_reading_deprecated_names_warns_nobody() -> None:
    assert docstrings(["torch", "torch.distributed"], limit=50)
