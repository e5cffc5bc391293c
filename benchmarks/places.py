"""Where the benchmark reads its data sets and keeps what it trained."""

from __future__ import annotations

import os
from pathlib import Path

from prunepass.errors import OptionError

__all__ = ["cache_folder", "data_folder", "models_folder", "pruned_folder"]

DATA = "PRUNEPASS_DATA"
CACHE = "PRUNEPASS_BENCH_CACHE"
REPOSITORY = Path(__file__).parents[1]


def data_folder() -> Path:
    """The folder of data sets, ``$PRUNEPASS_DATA/data``.

    Raises:
        OptionError: the variable is not set, or there is no such folder.
    """
    return _below_data("data")


def models_folder() -> Path:
    """The folder of models fine-tuned elsewhere, ``$PRUNEPASS_DATA/models``; errors as in `data_folder`."""
    return _below_data("models")


def cache_folder() -> Path:
    """Where trained models and scores are kept: ``$PRUNEPASS_BENCH_CACHE``, by default .bench-cache/ here. Is made."""
    folder = Path(os.environ.get(CACHE) or REPOSITORY / ".bench-cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pruned_folder(task: str, seed: int) -> Path:
    """Where the adapted model of row "both" is kept, with its plans; see `prunepass.training.loop.checkpoint`."""
    return cache_folder() / "pruned" / f"{task}.{seed}"


def _below_data(name: str) -> Path:
    root = os.environ.get(DATA)
    if not root:
        raise OptionError(f"The variable {DATA} is not set. Give the folder that holds data/ and models/.")
    folder = Path(root) / name
    if not folder.is_dir():
        raise OptionError(f"{DATA} is {root}, but there is no folder {folder}. Give the folder that holds {name}/.")
    return folder
