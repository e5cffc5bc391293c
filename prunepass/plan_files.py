"""Plans on disk: a folder with the plan as JSON and its predictors as safetensors. Some come with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prunepass.errors import PlanError, WeightsError
from prunepass.plan import PrunePlan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLAN_FILE", "WEIGHTS_FILE", "read", "shipped", "write"]

PLAN_FILE = "prunepass.json"
WEIGHTS_FILE = "predictors.safetensors"
_SHIPPED = Path(__file__).parent / "predictors"
_FORMAT = "prunepass-predictors"


def shipped() -> tuple[str, ...]:
    """Names of the plans that come with the package, each with predictors trained for one model.

    ``"all-MiniLM-L6-v2"`` costs 0.55 of the dense FLOPs; names with a budget after it, such as
    ``"all-MiniLM-L6-v2/budgets/0.4"``, are plans for other shares, and ``"all-MiniLM-L6-v2/predictors"`` holds a
    predictor for each block, to search with.
    """
    return tuple(sorted(str(f.parent.relative_to(_SHIPPED).as_posix()) for f in _SHIPPED.rglob(PLAN_FILE)))


def write(plan: PrunePlan, folder: Path) -> None:
    """Write ``prunepass.json`` and, where there are trained weights, ``predictors.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    if plan.weights:
        from safetensors.torch import save_file

        tensors = {k: v.detach().cpu().contiguous() for k, v in plan.weights.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": _FORMAT})
    else:  # a folder must not hand this plan the weights of the one it replaces
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")


def read(place: Path) -> PrunePlan:
    """The plan in a folder, or in a JSON file, or of a name of `shipped`.

    Raises:
        PlanError: there is none.
        WeightsError: the weights file is damaged or was not written by prunepass.
    """
    file = next((f for f in _candidates(place) if f.is_file()), None)
    if file is None:
        raise PlanError(
            f"There is no plan at {place}: expected a folder that holds {PLAN_FILE}, or the name of a plan that comes "
            f"with prunepass: {', '.join(shipped())}."
        )
    plan = PrunePlan.from_json(file.read_text(encoding="utf-8"))
    weights_file = file.parent / WEIGHTS_FILE
    if not weights_file.is_file():
        return plan
    return replace(plan, weights=_read_weights(weights_file, len(plan.stages)))


def _candidates(place: Path) -> list[Path]:
    """Where the plan's JSON may stand; a folder of the user's, even without a plan, goes before a name of ours."""
    if place.is_dir():
        return [place / PLAN_FILE]
    return [place] if place.anchor or ".." in place.parts else [place, _SHIPPED / place / PLAN_FILE]


def _read_weights(file: Path, num_stages: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as e:
        raise WeightsError(
            f"{file} is damaged and cannot be read ({e}). Write it again with save_pretrained."
        ) from None
    if metadata.get("format") != _FORMAT:
        raise WeightsError(f"{file} was not written by prunepass, so its tensors are not taken for predictors.")
    for key in weights:
        part = key.split(".")
        if len(part) < 3 or part[0] != "stages" or not part[1].isdigit() or int(part[1]) >= num_stages:
            raise WeightsError(f"{file} holds {key!r}, which belongs to no stage of the plan beside it.")
    return weights
