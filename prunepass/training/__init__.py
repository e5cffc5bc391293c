"""Training of predictors and gates, and search without training. The names below are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunepass.training.config import PruneConfig
    from prunepass.training.graphs import TrainingGraphs
    from prunepass.training.heads import Head, head_of
    from prunepass.training.options import Goal
    from prunepass.training.schedules import spread
    from prunepass.training.trainer import PruneTrainer

__all__ = ["Goal", "Head", "PruneConfig", "PruneTrainer", "TrainingGraphs", "head_of", "spread"]

_HOMES = {
    "Goal": "options",
    "Head": "heads",
    "PruneConfig": "config",
    "PruneTrainer": "trainer",
    "TrainingGraphs": "graphs",
    "head_of": "heads",
    "spread": "schedules",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
