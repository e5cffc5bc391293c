"""Trained weights of a plan on disk: one safetensors file, whose tensors must fit the plan's stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunepass.errors import MissingExtraError, WeightsError
from prunepass.plan.values import shown

if TYPE_CHECKING:
    from torch import Tensor

    from prunepass.plan.parts import ScorerSpec, Stage

__all__ = ["Planned", "load", "save"]

_FORMAT = "prunepass-predictors"


class Planned(Protocol):
    """What files need to know of a plan."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its stages, in order."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Its trained weights, by name."""

    def scorer_of(self, index: int) -> ScorerSpec:
        """The scorer of a stage."""

    def to_json(self) -> str:
        """All but the weights."""


def save(plan: Planned, file: Path, plan_digest: str) -> None:
    """Write the weights of ``plan``; a file without tensors where there are none.

    Raises:
        WeightsError: they do not fit the plan's stages, or hold NaN or infinity; `load` would not take them.
        OSError: the disk refuses.
    """
    safetensors = _safetensors()
    _check(plan, plan.weights, str(file.parent))
    tensors = _separate(plan.weights)
    try:
        safetensors.torch.save_file(tensors, file, metadata={"format": _FORMAT, "plan": plan_digest})
    except safetensors.SafetensorError as e:
        raise OSError(str(e)) from e


def load(plan: Planned, file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights in ``file``, and the digest of the plan they were written with, as far as the file tells.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, was not written by prunepass, or does not fit the plan's stages.
    """
    if not file.exists():
        raise FileNotFoundError(file)
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise WeightsError(f"{file} was not written by prunepass, so its tensors are not taken for predictors.")
            _check_names(list(f.keys()), len(plan.stages), file)
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
    except (FileNotFoundError, WeightsError):
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as e:
        what = " ".join(str(e).split())[:200]
        raise WeightsError(
            f"{file} is damaged and cannot be read ({what}). Write it again with save_pretrained."
        ) from None
    _check(plan, weights, str(file))
    return weights, metadata.get("plan")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise MissingExtraError("safetensors", "hf", "A plan with trained weights") from None
    return safetensors


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none sharing memory with another, as the format demands."""
    seen: set[int] = set()
    out = {}
    for name, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _check_names(names: Iterable[str], num_stages: int, where: Any) -> None:
    for name in names:
        part = name.split(".")
        stage = part[1] if len(part) >= 3 and part[0] == "stages" else ""
        number = int(stage) if stage.isascii() and stage.isdigit() and len(stage) < 10 else num_stages
        if number >= num_stages or str(number) != stage:
            raise WeightsError(f"{where} holds {shown(name)}, which belongs to no stage of the plan beside it.")


def _check(plan: Planned, weights: Mapping[str, Tensor], where: str) -> None:
    import torch

    _check_names(weights, len(plan.stages), where)
    for name, value in weights.items():
        if value.is_meta or value.layout != torch.strided:
            raise WeightsError(f"{where}: {name} is no dense tensor with values, so it cannot be kept in a file.")
        if value.is_floating_point() and not bool(torch.isfinite(value.detach()).all()):
            raise WeightsError(
                f"{where}: {name} holds NaN or infinity, so its training went wrong. Train it again, at a lower "
                "learning rate."
            )
    for index, stage in enumerate(plan.stages):
        _check_stage(plan, index, weights, f"{where}: the stage {stage.place}")


def _check_stage(plan: Planned, index: int, weights: Mapping[str, Tensor], where: str) -> None:
    from prunepass.scorers import check_weights
    from prunepass.scorers.lens import PREFIX, check_lens

    prefix = f"stages.{index}."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    lens = {k.removeprefix(PREFIX): v for k, v in own.items() if k.startswith(PREFIX)}
    if lens:
        check_lens(lens, where)
    scorer = {k: v for k, v in own.items() if not k.startswith(PREFIX)}
    if scorer:
        check_weights(plan.scorer_of(index).name, scorer, where)
