"""What to prune, where, and how much: `PrunePlan`, `Stage`, `Protect`. Data only; nothing here touches a graph."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunepass.errors import PlanError
from prunepass.folders import as_path
from prunepass.lens import PREFIX
from prunepass.plan_counts import kept_count, protected_last, share_of
from prunepass.plan_json import from_mapping, parse, unknown_key
from prunepass.plan_values import MAX_DENOMINATOR, as_flag, as_fraction, as_index, as_json, as_list, as_options, shown

if TYPE_CHECKING:
    from decimal import Decimal
    from typing import SupportsFloat, TypeAlias

    from torch import Tensor

    #: how a share may be written; each is held as an exact fraction
    Share: TypeAlias = int | float | str | Fraction | Decimal | SupportsFloat
    ScorerLike: TypeAlias = "ScorerSpec | str | Mapping[str, Any]"

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
RESTORES = ("last", "lens", "mean", "zeros")


@dataclass(frozen=True)
class Protect:
    """Tokens that are kept before any other.

    Args:
        first: number of live tokens at the start of each row ([CLS], attention sinks).
        last: number of live tokens at the end of each row (the last prompt token of a decoder).
        token_ids: ids that are kept wherever they stand ([SEP], a marker). Where a row holds more of them than its
            budget allows, the earlier ones are kept.
        last_share: share of each row, counted from its end, in [0, 1) (SDTP's "local" tokens: 1/10). The larger of
            ``last`` and this share holds.
    """

    first: int = 1
    last: int = 0
    token_ids: tuple[int, ...] = ()
    last_share: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", as_index(self.first, "Protect.first"))
        object.__setattr__(self, "last", as_index(self.last, "Protect.last"))
        ids = as_list(self.token_ids, "Protect.token_ids", "token ids")
        object.__setattr__(self, "token_ids", tuple(as_index(i, "Protect.token_ids") for i in ids))
        share = as_fraction(self.last_share, "Protect.last_share")
        if not 0 <= share < 1:
            raise PlanError(f"Protect.last_share must lie in [0, 1), not {shown(self.last_share)}.")
        object.__setattr__(self, "last_share", share)

    @property
    def always_last(self) -> int:
        """Number of tokens protected at the end of a row of any length; of a row that has fewer, all are."""
        return self.last or (1 if self.last_share else 0)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a plan's JSON."""
        return {
            "first": self.first,
            "last": self.last,
            "token_ids": list(self.token_ids),
            "last_share": str(self.last_share),
        }


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer by name with its options, as it stands in a plan's JSON: ``{"name": "random", "seed": 7}``."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"A scorer's name must be text, not {shown(self.name)}.")
        pairs = as_list(self.options, "ScorerSpec.options", "pairs of a name and a value")
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise PlanError(f"ScorerSpec.options must be pairs of a name and a value, not {shown(self.options)}.")
        where = f"of the scorer {shown(self.name)}"
        plain = {key: as_options(value, f"The option {shown(key)} {where}") for key, value in pairs}
        object.__setattr__(self, "options", tuple(sorted(plain.items(), key=lambda pair: pair[0])))

    @classmethod
    def of(cls, value: ScorerSpec | str | Mapping[str, Any]) -> ScorerSpec:
        """From a name, or a mapping with the name and the options. Raises `PlanError` for anything else."""
        if isinstance(value, ScorerSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], tuple((k, v) for k, v in value.items() if k != "name"))
        raise PlanError(f"A scorer is a name or a mapping with a 'name', not {shown(value)}.")

    def to_json(self) -> str | dict[str, Any]:
        """The name alone where there are no options, else a mapping."""
        options = {key: as_json(value) for key, value in self.options}
        return {"name": self.name, **options} if options else self.name

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True)
class Stage:
    """One place where tokens leave.

    Args:
        layer: 0-based block that the stage stands before (or after whose attention it stands: ``after_attention``).
        keep: share in (0, 1] of the row's *original* live tokens that is kept from here on; held as an exact fraction.
        scorer: name or spec of the scorer; ``None`` takes the plan's.
        after_attention: prune between the block's attention and its feed-forward part (as ToP's gates do).
    """

    layer: int
    keep: Fraction
    scorer: ScorerSpec | None = None
    after_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", as_index(self.layer, "Stage.layer"))
        keep = as_fraction(self.keep, f"keep of the stage at layer {self.layer}")
        if not 0 < keep <= 1:
            raise PlanError(
                f"The stage at layer {self.layer} has keep={shown(self.keep)}; keep is the share of tokens that stays "
                f"and must lie in (0, 1]. Shares are held to 1/{MAX_DENOMINATOR}."
            )
        object.__setattr__(self, "keep", keep)
        if self.scorer is not None:
            object.__setattr__(self, "scorer", ScorerSpec.of(self.scorer))
        object.__setattr__(self, "after_attention", as_flag(self.after_attention, "Stage.after_attention"))

    @property
    def place(self) -> str:
        """In words, for messages: ``before block 3``."""
        return f"{'after the attention of' if self.after_attention else 'before'} block {self.layer}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a plan's JSON; keep as an exact fraction."""
        out: dict[str, Any] = {"layer": self.layer, "keep": str(self.keep)}
        if self.scorer is not None:
            out["scorer"] = self.scorer.to_json()
        if self.after_attention:
            out["after_attention"] = True
        return out


@dataclass(frozen=True)
class PrunePlan:
    """An ordered list of stages, with the scorer and the protected tokens they share.

    Args:
        stages: in the order of the model; ``keep`` never rises along them.
        scorer: for the stages that name none.
        protect: tokens kept first, in all stages.
        restore: what an output with a sequence axis carries at pruned positions: ``"last"``, the last hidden state they
            had; ``"lens"``, an estimate of their last hidden state from that (`prunepass.lens.Lens`, trained);
            ``"mean"``, the mean of the tokens kept to the end, so that a mean over the row is exactly that; or
            ``"zeros"``, with which such a mean has the same direction, but is shorter.
        weights: trained weights, ``"stages.<i>.<parameter>" -> Tensor``, where i counts the stages given: those of
            predictors, and those of lenses after ``"stages.<i>.lens."``.

    Raises:
        PlanError: when the stages are out of order, stand twice in one place, or a keep rises.
    """

    stages: tuple[Stage, ...]
    scorer: ScorerSpec = ScorerSpec("attention")
    protect: Protect = field(default_factory=Protect)
    restore: str = "last"
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

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
        one, two = ((p.stages, p.scorer, p.protect, p.restore) for p in (self, other))
        return one == two and _same_weights(self.weights, other.weights)

    def scorer_of(self, index: int) -> ScorerSpec:
        """The scorer of stage ``index``: its own, else the plan's."""
        return self.stages[index].scorer or self.scorer

    def weights_of(self, index: int) -> dict[str, Tensor]:
        """The trained weights of stage ``index``'s scorer, by parameter name."""
        return {k: v for k, v in self._weights_of(index).items() if not k.startswith(PREFIX)}

    def lens_of(self, index: int) -> dict[str, Tensor]:
        """The trained weights of stage ``index``'s lens, by parameter name; empty where there is none."""
        return {k.removeprefix(PREFIX): v for k, v in self._weights_of(index).items() if k.startswith(PREFIX)}

    def _weights_of(self, index: int) -> dict[str, Tensor]:
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
        cls, keep: Any, layers: Sequence[int], scorer: Any = "attention", protect: Any = None, restore: str = "last"
    ) -> PrunePlan:
        """A plan from the short form ``{"keep": 0.5, "layers": [2, 4], "scorer": "attention"}``.

        One number means: at each listed layer this share of the tokens that *arrive* is kept (so 0.5 at two layers
        leaves 1/2, then 1/4). A list gives each layer's share of the original tokens.
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
        if isinstance(protect, Mapping):
            protect = from_mapping(Protect, protect, "protect")
        stages = tuple(Stage(layer, k) for layer, k in zip(blocks, keeps, strict=True))
        return cls(stages, ScorerSpec.of(scorer), protect or Protect(), restore)

    @classmethod
    def sdtp(
        cls,
        num_layers: int,
        *,
        start: int | None = None,
        step: int | None = None,
        num_stages: int = 10,
        ratio: Any = Fraction(9, 10),
        local: Any = Fraction(1, 10),
        first: int = 4,
        scorer: Any = "mlp",
    ) -> PrunePlan:
        """The schedule of SDTP (arXiv:2504.04514, sec. 4): stage s keeps ``local + (1 - local) * ratio^s``, s from 1.

        The paper's reading is "ratio^s" with the first tokens and the local tenth of the row kept besides; this form
        is the one that gives the FLOPs of its Table 2. For 32 layers the stages stand before blocks 3, 6, ..., 30.

        Args:
            num_layers: blocks of the model.
            start, step: block of the first stage, and blocks from one to the next; by default 3 of 32, in proportion.
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
        return {
            "format": "prunepass-plan",
            "version": FORMAT_VERSION,
            "stages": [s.to_dict() for s in self.stages],
            "scorer": self.scorer.to_json(),
            "protect": self.protect.to_dict(),
            "restore": self.restore,
        }

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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``prunepass.json`` and, where there are trained weights, ``predictors.safetensors``.

        A plan that lies there is replaced in one step. Whatever fails, it stays as it was, and so does all else.

        Raises:
            OptionError, ExportError: the folder cannot be written, or the disk is full.
            WeightsError: the weights do not fit the plan's stages, or hold NaN or infinity.
        """
        from prunepass.plan_files import write

        write(self, as_path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PrunePlan:
        """Read a folder written by `save_pretrained`, or one of the plans that come with prunepass, by its name
        (`prunepass.plan_files.shipped`). Nothing is unpickled.

        Raises:
            PlanError: no such folder or no plan in it.
            WeightsError: the weights file is damaged, was not written by prunepass or does not fit the plan.
        """
        from prunepass.plan_files import read

        return read(as_path(folder))


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
