"""What plans are in a folder: the plan itself, or with several a list of the levels and a folder of each plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.plan.folders import writing
from prunepass.plan.levels import DEFAULT_LEVEL, LEVEL

if TYPE_CHECKING:
    from prunepass.plan.levels import Levels

__all__ = ["LEVELS_FILE", "LEVELS_FORMAT", "write_levels"]

LEVELS_FILE = "levels.json"
LEVELS_FORMAT = ("prunepass-levels", 1)


def write_levels(levels: Levels, folder: Path) -> None:
    """Write ``levels.json`` and, for each plan, ``levels/1``, ``levels/2`` and so on, as `PrunePlan` saves it.

    ``levels.json`` holds the name of the input that chooses, the level of calls that leave it out, and by level the
    folder of the plan (null for level 0, which keeps all tokens) and its stages.

    Raises:
        ExportError: the disk is full, or refuses.
    """
    listed: list[dict[str, Any]] = [{"level": 0, "plan": None, "stages": []}]
    for number, plan in enumerate(levels.plans, 1):
        place = f"levels/{number}"
        plan.save_pretrained(folder / place)
        listed.append({"level": number, "plan": place, "stages": [stage.to_dict() for stage in plan.stages]})
    kind, version = LEVELS_FORMAT
    said = {"format": kind, "version": version, "input": LEVEL, "default": DEFAULT_LEVEL, "levels": listed}
    with writing(folder):
        (folder / LEVELS_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
