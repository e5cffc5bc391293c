"""A student on disk: a folder that deploys as it is, and holds what is needed to go on training.

The user's model and tokenizer lie there as transformers writes them, the goal's plan as `PrunePlan.save_pretrained`
does, plans of extra budgets in folders of their own, and the state of predictors at all cuts, gates and constraint
beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunepass.errors import PlanError, WeightsError
from prunepass.plan import PrunePlan, Stage
from prunepass.training.loop.student import Student

__all__ = ["keep_plans", "load_student", "save_plans", "save_student"]

STATE_FILE = "prunepass_training.safetensors"
NOTES_FILE = "prunepass_training.json"
BUDGETS_FOLDER = "budgets"
PREDICTORS_FOLDER = "predictors"


def save_plans(student: Student, folder: Path) -> None:
    """Write the goal's plan with its predictors, those of extra budgets under ``budgets/<share>``, and the predictors
    of all cuts under ``predictors``."""
    for i in range(len(student.plans)):
        home = folder if i == 0 else folder / BUDGETS_FOLDER / f"{student.settings.extra_budgets[i - 1]:g}"
        student.trained_plan(i).save_pretrained(home)
    predictors = student.all_predictors()
    if predictors is not None:
        predictors.save_pretrained(folder / PREDICTORS_FOLDER)


def keep_plans(student: Student, folder: Path) -> None:
    """Write what `save_student` does but for weights that training changes: plans, and what tells of them."""
    save_plans(student, folder)
    notes = _notes(student) | {
        "plans": [p.to_dict() for p in student.plans],
        "searches": student.searches,
        "read_off": {b: [s.to_dict() for s in stages] for b, stages in student.read_off.items()},
    }
    (folder / NOTES_FILE).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


def save_student(student: Student, folder: Path) -> None:
    """Write everything; see the module's text."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    keep_plans(student, folder)
    state = {k: v.detach().cpu().contiguous() for k, v in _own_state(student).items()}
    save_file(state, folder / STATE_FILE, metadata={"format": "prunepass-training"})
    if not student.settings.freeze_model:
        model: Any = student.model
        model.save_pretrained(folder)


def load_student(student: Student, folder: Path) -> None:
    """Take up the state written by `save_student`.

    Raises:
        PlanError: no such folder.
        WeightsError: it belongs to another model or another way of training, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    notes_file = folder / NOTES_FILE
    if not notes_file.is_file():
        raise PlanError(f"{folder} holds no prunepass checkpoint: {NOTES_FILE} is not there.")
    notes = json.loads(notes_file.read_text(encoding="utf-8"))
    for name, mine in _notes(student).items():
        if notes.get(name) != mine:
            raise WeightsError(
                f"The checkpoint {folder} was written with {name} {notes.get(name)!r}, but here it is {mine!r}. Resume "
                "with the model and options that training began with, or start anew."
            )
    try:
        state = load_file(folder / STATE_FILE)
    except (SafetensorError, OSError) as e:
        raise WeightsError(f"The checkpoint {folder} is damaged ({e}); resume from an earlier one.") from None
    if not student.settings.freeze_model:
        model: Any = student.model
        trained = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
        model.load_state_dict(trained.state_dict())
    missing, unexpected = student.load_state_dict(state, strict=False)
    wrong = [k for k in missing if not k.startswith("model.")] + unexpected
    if wrong:
        raise WeightsError(f"The checkpoint {folder} does not fit: {', '.join(wrong[:3])}.")
    student.plans = [PrunePlan.from_dict(p) for p in notes["plans"]]
    student.searches = notes.get("searches", [])
    student.read_off = {b: [Stage(**s) for s in stages] for b, stages in notes.get("read_off", {}).items()}
    student.forms.forget_plans()


def _own_state(student: Student) -> dict[str, Tensor]:
    """Predictors, gates and constraint: all but the user's model."""
    return {k: v for k, v in student.state_dict().items() if not k.startswith("model.")}


def _notes(student: Student) -> dict[str, Any]:
    """What a checkpoint must have in common with the student that takes it up."""
    settings = student.settings
    return {
        "model": type(student.model).__name__,
        "blocks": student.num_blocks,
        "width": student.width,
        "vocabulary": getattr(getattr(student.model, "config", None), "vocab_size", None),
        "method": settings.method,
        "search": settings.searches_by,
        "signal": settings.ranks_by,
        "goal": [settings.goal.share, settings.goal.latency_ms, settings.goal.target],
        "protect": settings.protect.to_dict(),
        "restore": settings.restore,
        "scorer": settings.ranker.to_json(),
        "plan": settings.plan.to_dict() if settings.plan is not None else None,
        "bins": settings.bins if student.gates is not None else None,
        "labels": getattr(getattr(student.model, "config", None), "num_labels", None),
        "weights": _size(student.model) if settings.freeze_model else None,
        "predictor_width": settings.predictor_width if student.predictors else None,
        "predictor_positions": settings.predictor_positions,
        "lens_rank": settings.lens_rank if settings.learns_lenses else None,
        "extra_budgets": list(settings.extra_budgets),
        "freeze_model": settings.freeze_model,
        "phases": list(settings.phases),
        "validation": student.validation,
    }


def _size(model: nn.Module) -> str:
    """Tells the weights of a frozen model from those of another of the same shape."""
    return f"{sum(p.detach().double().abs().sum().item() for p in model.parameters()):.9g}"
