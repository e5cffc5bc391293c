"""Where in the user's model a node comes from."""

from __future__ import annotations

import re

from torch.fx import Node

__all__ = ["layer_path", "module_path"]

_DYNAMO_PREFIX = re.compile(r"^L\['?(self|model|module)'?\]\.?|^self\.?")


def module_path(node: Node) -> str:
    """The dotted path of the innermost module that made a node: ``encoder.layer.3.attention.self``; "" if unknown.

    Dynamo writes ``L['self'].encoder.layer.3`` (or ``L['self']._modules['encoder']...``), torch.export
    ``encoder.layer.3``; both come out alike.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['([^']+)'\]", r".\1", path) if not path.startswith("L[") else path
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return _DYNAMO_PREFIX.sub("", path).strip(".")


def layer_path(path: str) -> str:
    """The part of a module path up to its last number: ``encoder.layer.3`` of ``encoder.layer.3.attention.self``."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else path
