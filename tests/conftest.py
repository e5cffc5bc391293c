"""What every test shares: no network, one thread, a fixed seed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models run fastest on one thread, and so do parallel workers.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


#: files whose graphs are checked by runs as well (PRUNEPASS_VERIFY=1): every architecture, every kind of plan. That
#: takes as long as the pruning itself, so the others have the checks that every user has.
VERIFIED = ("test_zoo_oracle", "test_hooks_oracle", "test_contracts", "test_fuzz")


@pytest.fixture(autouse=True)
def _contracts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in VERIFIED and "PRUNEPASS_VERIFY" not in os.environ:
        monkeypatch.setenv("PRUNEPASS_VERIFY", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_compilations() -> Iterator[None]:
    """Dynamo remembers the lengths it saw, by function: what one file compiles is not to change another's graphs."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet, and warnings that are given once were not given."""
    torch._dynamo.reset()
    if "prunepass.dynamo.backend" in sys.modules:
        sys.modules["prunepass.dynamo.backend"].tokprune.reset()
    yield
    torch._dynamo.reset()
