"""What every test shares: no network, one thread, a fixed seed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What torch keeps of the shapes of operators pays for models of many layers. To fill it costs tiny ones more: a seventh
# of a trace, a third of `explain`. `make test-all` has it, as users do.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# OpenVINO reports its use through this module, from forks of the process. A fork of a worker of many threads can hang,
# and then holds the worker's memory for as long as the tests run.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # none: its import fails

import pytest
import torch
from long_tests import COLLECTED, LONG

with contextlib.suppress(ImportError):
    import openvino

    _cores: list[openvino.Core] = []

    class _LastingCore(openvino.Core):  # type: ignore[misc]  # a compiled class
        """One that lives as long as the process, for the reason that `prunepass.backends._openvino_core` has. A data
        loader of an earlier test leaves a handler of signals behind, so cores that come and go would end the worker."""

        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            _cores.append(self)

    openvino.Core = _LastingCore  # type: ignore[misc]  # a class is no variable


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models run fastest on one thread, and so do parallel workers.
    torch.set_num_threads(1)
    # What traces leave lives on in caches for the most part: to look through all of it at every turn took a twentieth
    # of the time. Each file ends with a full collection.
    gc.set_threshold(700, 10, 50)


@pytest.hookimpl(tryfirst=True)  # before the expression of -m is applied
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = frozenset(item.path.name + item.nodeid[item.nodeid.index("::") :] for item in items)
    for item in items:
        if item.nodeid.endswith(LONG):
            item.add_marker(pytest.mark.slow)
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


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_stack = ctypes.create_string_buffer(1 << 18)


@pytest.fixture(autouse=True)
def _stack_for_signals() -> None:
    """Handlers of signals run on a stack that is there. Cores of OpenVINO change it, those inside openvino-genai and
    nncf as well, and may leave one that is gone, where the end of a child process would end the worker without a word.
    """
    if sys.platform == "linux":
        ours = _SignalStack(ctypes.addressof(_stack), 0, len(_stack))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(ours), None) == 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_compilations() -> Iterator[None]:
    """Dynamo remembers the lengths it saw, by function: what one file compiles is not to change another's graphs.

    What is left when a file ends (modules, graphs that files share) stays as long as the worker does: some millions of
    objects, which the collector need not go through again.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet, and warnings that are given once were not given."""
    torch._dynamo.reset()
    if "prunepass.dynamo.backend" in sys.modules:
        sys.modules["prunepass.dynamo.backend"].tokprune.reset()
    yield
    torch._dynamo.reset()
