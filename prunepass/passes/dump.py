"""Writing the graph after each pass: ``PRUNEPASS_DUMP=folder python program.py``."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from prunepass.graph.inputs import fake_value

__all__ = ["hook_from_environment"]

logger = logging.getLogger(__name__)
_runs = itertools.count()


def hook_from_environment() -> Callable[[str, GraphModule], None] | None:
    """A hook that writes ``<folder>/<process>-<run>/<step>_<pass>.py``, one run a pruned graph.

    Returns:
        The hook, a function of the pass's name and the graph after it; None where ``PRUNEPASS_DUMP`` is not set.
    """
    root = os.environ.get("PRUNEPASS_DUMP")
    if not root:
        return None
    folder = Path(root) / f"{os.getpid()}-{next(_runs):02d}"
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Writing the graph after each pass into %s", folder)

    def write(step: str, gm: GraphModule) -> None:
        text = "\n".join(_line(n) for n in gm.graph.nodes)
        (folder / f"{step}.py").write_text(text + "\n", encoding="utf-8")

    return write


def _line(node: Node) -> str:
    mark = node.meta.get("prunepass")
    ours = f"  <- {mark['pass']}" if mark else ""
    return f"{node.format_node()}{_description(fake_value(node))}{ours}"


def _description(value: Any) -> str:
    if value is None:
        return ""
    return f"  # {list(value.shape)} {value.dtype}" if hasattr(value, "shape") else f"  # {value}"
