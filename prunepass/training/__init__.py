"""Training of predictors and gates, and search without training. The names below are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunepass.training.data.heads import Head, head_of
    from prunepass.training.data.options import Goal
    from prunepass.training.loop.config import PruneConfig
    from prunepass.training.loop.trainer import PruneTrainer
    from prunepass.training.methods.graphs import TrainingGraphs
    from prunepass.training.methods.schedules import spread

__all__ = ["Goal", "Head", "PruneConfig", "PruneTrainer", "TrainingGraphs", "head_of", "spread"]

_HOMES = {
    "Goal": "data.options",
    "Head": "data.heads",
    "PruneConfig": "loop.config",
    "PruneTrainer": "loop.trainer",
    "TrainingGraphs": "methods.graphs",
    "head_of": "data.heads",
    "spread": "methods.schedules",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
