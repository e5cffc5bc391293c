"""OpenVINO itself, and the one core that all of prunepass shares. Nothing here needs torch."""

from __future__ import annotations

import functools
from typing import Any

from prunepass.errors import MissingExtraError

__all__ = ["core", "require"]


def require() -> Any:
    """The package ``openvino``, or `MissingExtraError`."""
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino", "Target 'openvino'") from None
    return openvino


@functools.cache
def core() -> Any:
    """The ``openvino.Core`` of this process.

    There is one, and it lives to the end: a core sets the stack that its thread runs signal handlers on, and puts back
    the one before when it goes. Where several come and go, that one may be gone already, and the next signal whose
    handler runs in Python (Ctrl-C, the end of a child process) ends the process without a message.
    """
    return require().Core()
