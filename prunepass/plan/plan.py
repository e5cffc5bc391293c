"""What to prune, where, and how much: `PrunePlan`, `Stage`, `Protect`. Data only; nothing here touches a graph."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from prunepass.errors import PlanError
from prunepass.plan.counts import kept_count, protected_last, share_of
from prunepass.plan.folders import as_path
from prunepass.plan.parts import Protect, ScorerSpec, Stage
from prunepass.plan.strict_json import from_mapping, parse, unknown_key
from prunepass.plan.values import MAX_DENOMINATOR, as_fraction, as_index, as_list, shown
from prunepass.scorers.lens import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from prunepass.plan.annotations import Leave, Restore, Share
    from prunepass.plan.parts import ProtectLike, ScorerLike

__all__ = [
    "MAX_DENOMINATOR",
    "Protect",
    "PrunePlan",
    "ScorerSpec",
    "Stage",
    "as_fraction",
    "kept_count",
    "protected_last",
    "share_of",
    "unknown_key",
]

FORMAT_VERSION = 1
RESTORES = ("last", "lens", "mean", "zeros", "none")


@dataclass(frozen=True, repr=False)
class PrunePlan:
    """An ordered list of stages, with the scorer and the protected tokens they share.

    Args:
        stages: in the order of the model; ``keep`` never rises along them.
        scorer: for the stages that name none.
        protect: tokens kept first, in all stages.
        restore: what an output with a sequence axis carries at pruned positions: ``"last"``, the last hidden state they
            had; ``"lens"``, an estimate of their last hidden state from that (`prunepass.scorers.lens.Lens`, trained);
            ``"mean"``, the mean of the tokens kept to the end, so that a mean over the row is exactly that; or
            ``"zeros"``, with which such a mean has the same direction, but is shorter. With ``"none"`` outputs have no
            pruned positions: they are as short as the last stage leaves them, and a decoder's cross-attention reads
            the tokens that are left.
        weights: trained weights, ``"stages.<i>.<parameter>" -> Tensor``, where i counts the stages given: those of
            predictors, and those of lenses after ``"stages.<i>.lens."``.
        stream: which residual stream, in a model that has several: the path of a module that holds its blocks, such as
            ``"vision_model"``. None for the one that leads to the output.

    Raises:
        PlanError: when the stages are out of order, stand twice in one place, or a keep rises.
    """

    stages: tuple[Stage, ...]
    scorer: ScorerSpec = field(default_factory=lambda: ScorerSpec("attention"))
    protect: Protect = field(default_factory=Protect)
    restore: Restore = "last"
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    stream: str | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            stages: Sequence[Stage],
            scorer: ScorerLike = "attention",
            protect: Protect = ...,
            restore: Restore = "last",
            weights: Mapping[str, Tensor] = ...,
            stream: str | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.stages, (Stage, str)) or not isinstance(self.stages, Sequence):
            raise PlanError(f"PrunePlan.stages must be a list of Stage, not {type(self.stages).__name__}.")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise PlanError(f"PrunePlan.stages must hold Stage objects, not {shown(stage)}.")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "scorer", ScorerSpec.of(self.scorer))
        if not isinstance(self.protect, Protect):
            raise PlanError(f"PrunePlan.protect must be a Protect object, not {shown(self.protect)}.")
        if not isinstance(self.restore, str) or self.restore not in RESTORES:
            raise PlanError(f"PrunePlan.restore must be one of {', '.join(RESTORES)}, not {shown(self.restore)}.")
        _check_weights(self.weights)
        if self.stream is not None and (not isinstance(self.stream, str) or not self.stream):
            raise PlanError(f"PrunePlan.stream must be a module path such as 'vision_model', not {shown(self.stream)}.")
        if self.restore == "lens" and (merging := [s for s in self.stages if s.leave == "merge"]):
            raise PlanError(
                f"restore='lens' estimates the last state of tokens from the one they left with, and those of the "
                f"stage {merging[0].place} are merged: they get their host's state. Say restore='last' or leave='drop'."
            )
        if self.restore == "none" and (merging := [s for s in self.stages if s.leave == "merge"]):
            raise PlanError(
                f"restore='none' leaves states to a decoder, which does not count how many tokens a state stands for, "
                f"and those of the stage {merging[0].place} are merged. Say leave='drop', or restore='last'."
            )
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if (after.layer, after.after_attention) <= (before.layer, before.after_attention):
                raise PlanError(
                    f"Stages must stand in the order of the model, one at each place: {after.place} comes after "
                    f"{before.place} in the plan. Sort them by layer."
                )
            if after.keep > before.keep:
                raise PlanError(
                    f"keep rises from {before.keep} ({before.place}) to {after.keep} ({after.place}). keep counts the "
                    "row's original tokens and those pruned do not come back, so it can only stay or fall."
                )

    def __eq__(self, other: object) -> bool:
        # the weights count: torch.compile takes a graph that it has for an equal plan
        if not isinstance(other, PrunePlan):
            return NotImplemented
        one, two = ((p.stages, p.scorer, p.protect, p.restore, p.stream) for p in (self, other))
        return one == two and _same_weights(self.weights, other.weights)

    def __repr__(self) -> str:
        stages = [repr(stage) for stage in self.stages[:4]] + (["..."] if len(self.stages) > 4 else [])
        more = "" if self.restore == "last" else f", restore={self.restore!r}"
        more += "" if self.stream is None else f", stream={self.stream!r}"
        weights = f", {len(self.weights)} weights" if self.weights else ""
        listed = ", ".join(stages)
        return f"PrunePlan([{listed}], {shown(str(self.scorer))}, {self.protect!r}{more}{weights})"

    def scorer_of(self, index: int) -> ScorerSpec:
        """The scorer of stage ``index``: its own, else the plan's."""
        return self.stages[index].scorer or self.scorer

    def weights_of(self, index: int) -> dict[str, Tensor]:
        """The trained weights of stage ``index``'s scorer, by parameter name."""
        return {k: v for k, v in self.all_weights_of(index).items() if not k.startswith(PREFIX)}

    def lens_of(self, index: int) -> dict[str, Tensor]:
        """The trained weights of stage ``index``'s lens, by parameter name; empty where there is none."""
        return {k.removeprefix(PREFIX): v for k, v in self.all_weights_of(index).items() if k.startswith(PREFIX)}

    def all_weights_of(self, index: int) -> dict[str, Tensor]:
        """The trained weights of stage ``index``: its scorer's, and those of its lens after ``"lens."``."""
        prefix = f"stages.{index}."
        return {k[len(prefix) :]: v for k, v in self.weights.items() if k.startswith(prefix)}

    @property
    def tokens_to_trace(self) -> int:
        """Length of a row of which every stage keeps at least two tokens.

        Tracers take a size of one for a constant, so a graph that is to hold for all lengths is traced at no fewer.
        """
        keeps = [stage.keep for stage in self.stages if stage.keep < 1]
        fewest = (keep.denominator // keep.numerator + 1 for keep in keeps)
        return max([3, self.protect.first + self.protect.last + 2, *fewest]) if keeps else 3

    # -- short forms ---------------------------------------------------------------------------------------------

    @classmethod
    def default(cls, num_layers: int) -> PrunePlan:
        """The plan used when none is given: training-free and mild. Attention scores; 7/10 of the tokens from one
        third of the depth, 1/2 from two thirds."""
        if num_layers < 2:
            raise PlanError(f"The default plan needs a model of at least 2 blocks; this one has {num_layers}.")
        first = max(1, math.ceil(num_layers / 3))
        second = max(first + 1, math.ceil(2 * num_layers / 3))
        stages = [Stage(first, Fraction(7, 10))]
        if second < num_layers:
            stages.append(Stage(second, Fraction(1, 2)))
        return cls(tuple(stages))

    @classmethod
    def short(
        cls,
        keep: Share | Sequence[Share],
        layers: Sequence[int],
        scorer: ScorerLike = "attention",
        protect: ProtectLike | None = None,
        restore: Restore = "last",
        leave: Leave = "drop",
    ) -> PrunePlan:
        """A plan from the short form ``{"keep": 0.5, "layers": [2, 4], "scorer": "attention"}``.

        One number means: at each listed layer this share of the tokens that *arrive* is kept (so 0.5 at two layers
        leaves 1/2, then 1/4). A list gives each layer's share of the original tokens. ``leave`` is that of every stage,
        see `Stage`.
        """
        blocks = as_list(layers, "layers", "block numbers")
        if not blocks:
            raise PlanError(f"layers must be a non-empty list of block numbers, not {shown(layers)}.")
        if (isinstance(keep, Sequence) and not isinstance(keep, str)) or getattr(keep, "ndim", 0) == 1:
            shares = as_list(keep, "keep", "shares")
            if len(shares) != len(blocks):
                raise PlanError(f"keep lists {len(shares)} shares for {len(blocks)} layers; give one for each.")
            keeps = [as_fraction(k, "keep") for k in shares]
        else:
            share = as_fraction(keep, "keep")
            if not 0 < share <= 1:
                raise PlanError(f"keep is the share of tokens that stays and must lie in (0, 1], not {shown(keep)}.")
            keeps = [share ** (i + 1) for i in range(len(blocks))]
        held: Protect = (
            from_mapping(Protect, protect, "protect") if isinstance(protect, Mapping) else protect or Protect()
        )
        stages = tuple(Stage(layer, k, leave=leave) for layer, k in zip(blocks, keeps, strict=True))
        return cls(stages, ScorerSpec.of(scorer), held, restore)

    @classmethod
    def sdtp(
        cls,
        num_layers: int,
        *,
        start: int | None = None,
        step: int | None = None,
        num_stages: int = 10,
        ratio: Share = Fraction(9, 10),
        local: Share = Fraction(1, 10),
        first: int = 4,
        scorer: ScorerLike = "mlp",
    ) -> PrunePlan:
        """The schedule of SDTP (arXiv:2504.04514, sec. 4): stage s keeps ``local + (1 - local) * ratio^s``, s from 1.

        The paper's reading is "ratio^s" with the first tokens and the local tenth of the row kept besides; this form
        is the one that gives the FLOPs of its Table 2. For 32 layers the stages stand before blocks 3, 6, ..., 30.

        Args:
            num_layers: blocks of the model.
            start: block of the first stage; by default 3 of 32, in proportion.
            step: blocks from one stage to the next; by default 3 of 32, in proportion.
            num_stages: at most so many, as far as the model's depth goes (the paper's SDTP-low has 5).
            ratio: in (0, 1); what a stage keeps of the tokens that reach it, of those that are not local.
            local: share of the row, counted from its end, that is protected.
            first: number of tokens protected at the row's start.
            scorer: "mlp" needs trained predictors; they are no part of this plan.

        Raises:
            PlanError: there is no block to place a stage before, or a number is outside its range.
        """
        each = max(1, round(3 * as_index(num_layers, "num_layers") / 32))
        start, step = each if start is None else start, each if step is None else step
        share, rest = as_fraction(ratio, "ratio"), as_fraction(local, "local")
        stages_fit = as_index(num_stages, "num_stages") >= 1
        if as_index(start, "start") >= num_layers or as_index(step, "step") < 1 or not stages_fit:
            raise PlanError(
                f"No stage of SDTP's schedule fits a model of {num_layers} blocks with start={start}, step={step} and "
                f"num_stages={num_stages}; start must be a block of the model, step and num_stages at least 1."
            )
        if not 0 < share < 1:
            raise PlanError(f"ratio must lie between 0 and 1, not {ratio!r}.")
        layers = range(start, num_layers, step)[:num_stages]
        stages = tuple(Stage(layer, rest + (1 - rest) * share**s) for s, layer in enumerate(layers, 1))
        return cls(stages, ScorerSpec.of(scorer), Protect(first=first, last_share=rest))

    # -- JSON and folders ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON takes it, but for trained weights, which travel beside it."""
        out = {
            "format": "prunepass-plan",
            "version": FORMAT_VERSION,
            "stages": [s.to_dict() for s in self.stages],
            "scorer": self.scorer.to_json(),
            "protect": self.protect.to_dict(),
            "restore": self.restore,
        }
        return out if self.stream is None else {**out, "stream": self.stream}  # plans without it stay as they were

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, weights: Mapping[str, Tensor] | None = None) -> PrunePlan:
        """A plan from `to_dict`'s form. Raises `PlanError` naming the key that is wrong."""
        if not isinstance(data, Mapping):
            raise PlanError(f"A plan is a JSON object, not {type(data).__name__}.")
        data = dict(data)
        if data.pop("format", "prunepass-plan") != "prunepass-plan":
            raise PlanError("This JSON is not a prunepass plan (its 'format' says otherwise).")
        version = data.pop("version", FORMAT_VERSION)
        if version != FORMAT_VERSION or isinstance(version, (bool, float)):
            raise PlanError(
                f"The plan has format version {shown(version)}; this prunepass reads {FORMAT_VERSION}. Update it."
            )
        if "weights" in data:
            raise PlanError("The plan's JSON holds 'weights', but weights stand in a safetensors file beside it.")
        if "stages" not in data:
            raise PlanError("The plan has no 'stages'.")
        if not isinstance(data["stages"], (list, tuple)):
            raise PlanError("The plan's 'stages' must be a list.")
        data["stages"] = tuple(from_mapping(Stage, s, f"stages[{i}]") for i, s in enumerate(data["stages"]))
        if "protect" in data:
            data["protect"] = from_mapping(Protect, data["protect"], "protect")
        plan: PrunePlan = from_mapping(cls, data, "the plan", weights=dict(weights or {}))
        return plan

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """A plan from the text of `to_json`. Raises `PlanError` naming what is wrong."""
        return cls.from_dict(parse(text))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``prunepass.json`` and, where there are trained weights, ``predictors.safetensors``.

        A plan that lies there is replaced in one step. Whatever fails, it stays as it was, and so does all else.

        Raises:
            OptionError, ExportError: the folder cannot be written, or the disk is full.
            WeightsError: the weights do not fit the plan's stages, or hold NaN or infinity.
        """
        from prunepass.plan.files import write

        write(self, as_path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PrunePlan:
        """Read a folder written by `save_pretrained`, or one of the plans that come with prunepass, by its name
        (`prunepass.plan.files.shipped`). Nothing is unpickled.

        Raises:
            PlanError: no such folder or no plan in it.
            WeightsError: the weights file is damaged, was not written by prunepass or does not fit the plan.
        """
        from prunepass.plan.files import read

        return read(as_path(folder), lambda text, weights: cls.from_dict(parse(text), weights=weights))


def _same_weights(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    if one.keys() != two.keys():
        return False
    return all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool((a == b).all()))
        for a, b in ((one[key], two[key]) for key in one)
    )


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping):
        raise PlanError(f"PrunePlan.weights must map names to tensors, not {shown(weights)}.")
    if not weights:
        return
    from torch import Tensor

    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise PlanError(f"PrunePlan.weights must map names to tensors, but holds {shown(name)}: {shown(value)}.")
