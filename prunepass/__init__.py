"""Token pruning as a compiler pass over unmodified transformers.

Names are loaded on first use: torch imports packages with a `torch_dynamo_backends` entry point early.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunepass.backends.cache import CacheInfo, cache_info
    from prunepass.errors import PruneError, RefusalError
    from prunepass.export.folder import export
    from prunepass.generation.compress import compress_cache
    from prunepass.pipeline import PrunedModule, prune
    from prunepass.plan import Protect, PrunePlan, ScorerSpec, Stage
    from prunepass.plan.levels import level
    from prunepass.report.build import Report, explain
    from prunepass.scorers import Scorer

__version__ = "0.1.0"

_HOMES = {
    "CacheInfo": "backends.cache",
    "Protect": "plan",
    "PruneError": "errors",
    "PrunePlan": "plan",
    "PrunedModule": "pipeline",
    "RefusalError": "errors",
    "Report": "report",
    "Scorer": "scorers",
    "ScorerSpec": "plan",
    "Stage": "plan",
    "cache_info": "backends.cache",
    "compress_cache": "generation.compress",
    "explain": "report",
    "export": "export",
    "level": "plan.levels",
    "prune": "pipeline",
}

__all__ = [
    "CacheInfo",
    "Protect",
    "PruneError",
    "PrunePlan",
    "PrunedModule",
    "RefusalError",
    "Report",
    "Scorer",
    "ScorerSpec",
    "Stage",
    "cache_info",
    "compress_cache",
    "explain",
    "export",
    "level",
    "prune",
]


class _Package(ModuleType):
    """This package, whose function `export` stays when the module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunepass' has no attribute {name!r}")
    value = getattr(import_module(f"prunepass.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
