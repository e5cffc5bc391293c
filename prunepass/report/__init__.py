"""What a plan does to a model: `explain`, and its report as data, text and HTML. Loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunepass.report.build import explain
    from prunepass.report.report import Report

__all__ = ["Report", "explain"]

_HOMES = {"Report": "report", "explain": "build"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
