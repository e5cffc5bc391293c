"""transformers' attention implementations that no pass can read, refused by name before a model is traced."""

from __future__ import annotations

from sys import _getframe
from typing import Any

from torch import nn

from prunepass.errors import RefusalError

__all__ = ["refuse_implementation", "refuse_running_implementation"]

_REASONS = {
    "flash_attention": "a kernel that takes no mask, so that the graph does not show which tokens are live",
    "flex_attention": "a kernel whose mask is a function compiled for the full length",
    "paged": "written for the packed rows and the paged cache of continuous batching, whose layers are of one length",
}


def refuse_implementation(model: nn.Module) -> None:
    """Raises `RefusalError` where a part of ``model`` computes attention in a way that no pass can read."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        _refuse(config, path or type(module).__name__)


def refuse_running_implementation() -> None:
    """The same for the model that is being called: the innermost on Python's stack that says how it attends."""
    frame: Any = _getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, nn.Module) and _implementation(getattr(owner, "config", None)) is not None:
            refuse_implementation(owner)
            return
        frame = frame.f_back


def _implementation(config: Any) -> str | None:
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, str) else None


def _refuse(config: Any, where: str) -> None:
    name = _implementation(config) or ""
    reason = next((why for start, why in _REASONS.items() if name.startswith(start)), None)
    if reason is None and "/" in name:
        reason = "a kernel from a hub, whose operator is not known to prunepass"
    if reason is not None:
        raise RefusalError(
            f"the attention implementation is {name!r}: {reason}.",
            where=where,
            hint='Load the model with attn_implementation="sdpa", or call model.set_attn_implementation("sdpa").',
        )
