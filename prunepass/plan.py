"""What to prune, where, and how much: `PrunePlan`, `Stage`, `Protect`. Data only; nothing here touches a graph."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunepass.errors import PlanError
from prunepass.lens import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Protect", "PrunePlan", "ScorerSpec", "Stage", "kept_count"]

FORMAT_VERSION = 1
MAX_DENOMINATOR = 10**4
RESTORES = ("last", "lens", "zeros")


def as_fraction(value: Any, name: str) -> Fraction:
    """An exact fraction from an int, a float (by its shortest decimal form: 0.1 is 1/10), text ("7/10") or Fraction.

    Held to the nearest fraction with a denominator of at most ten thousand.
    """
    if isinstance(value, bool):
        raise PlanError(f"{name} must be a number such as 0.5 or '1/2', not {value!r}.")
    try:
        exact = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise PlanError(f"{name} must be a number such as 0.5 or '1/2', not {value!r}.") from None
    # n * numerator must fit 32 bits (OpenVINO's CPU plugin computes integers in them), and 0.3333333333333333 means 1/3
    return exact.limit_denominator(MAX_DENOMINATOR)


def _as_index(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{name} must be a whole number of at least 0, not {value!r}.")
    return value


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
        _as_index(self.first, "Protect.first")
        _as_index(self.last, "Protect.last")
        ids: Any = self.token_ids  # as the caller wrote it
        if isinstance(ids, (int, str)):
            raise PlanError(f"Protect.token_ids must be a list of token ids, not {ids!r}.")
        object.__setattr__(self, "token_ids", tuple(_as_index(i, "Protect.token_ids") for i in ids))
        share = as_fraction(self.last_share, "Protect.last_share")
        if not 0 <= share < 1:
            raise PlanError(f"Protect.last_share must lie in [0, 1), not {self.last_share!r}.")
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

    @classmethod
    def of(cls, value: ScorerSpec | str | Mapping[str, Any]) -> ScorerSpec:
        """From a name, or a mapping with the name and the options. Raises `PlanError` for anything else."""
        if isinstance(value, ScorerSpec):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], tuple(sorted((k, v) for k, v in value.items() if k != "name")))
        raise PlanError(f"A scorer is a name or a mapping with a 'name', not {value!r}.")

    def to_json(self) -> str | dict[str, Any]:
        """The name alone where there are no options, else a mapping."""
        return {"name": self.name, **dict(self.options)} if self.options else self.name

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
        _as_index(self.layer, "Stage.layer")
        keep = as_fraction(self.keep, f"keep of the stage at layer {self.layer}")
        if not 0 < keep <= 1:
            raise PlanError(
                f"The stage at layer {self.layer} has keep={self.keep!r}; keep is the share of tokens that stays and "
                "must lie in (0, 1]."
            )
        object.__setattr__(self, "keep", keep)
        if self.scorer is not None:
            object.__setattr__(self, "scorer", ScorerSpec.of(self.scorer))
        object.__setattr__(self, "after_attention", bool(self.after_attention))

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


def kept_count(n: Any, keep: Fraction, protect: Protect, *, minimum: Any = min, maximum: Any = max) -> Any:
    """Number of tokens kept of ``n``: ``min(n, max(first + last, ceil(keep * n)))``, in integer arithmetic only.

    ``n`` may be an int, a SymInt or an integer tensor; for the last two pass the fitting ``minimum`` and ``maximum``.
    """
    count = (n * keep.numerator + (keep.denominator - 1)) // keep.denominator
    last = protected_last(n, protect, maximum=maximum)
    # ceil(keep * n) of a positive keep already lies in [1, n] for n >= 1, and is 0 for n = 0.
    if protect.first + protect.last <= 1 and not protect.last_share:
        return count
    return minimum(n, maximum(count, last + protect.first))


def protected_last(n: Any, protect: Protect, *, maximum: Any = max) -> Any:
    """Number of tokens protected at the end of a row of ``n``: ``max(last, ceil(last_share * n))``."""
    if not protect.last_share:
        return protect.last
    share = (n * protect.last_share.numerator + (protect.last_share.denominator - 1)) // protect.last_share.denominator
    return maximum(share, protect.last) if protect.last else share


@dataclass(frozen=True)
class PrunePlan:
    """An ordered list of stages, with the scorer and the protected tokens they share.

    Args:
        stages: in the order of the model; ``keep`` never rises along them.
        scorer: for the stages that name none.
        protect: tokens kept first, in all stages.
        restore: what an output with a sequence axis carries at pruned positions: ``"last"``, the last hidden state they
            had; ``"lens"``, an estimate of their last hidden state from that (`prunepass.lens.Lens`, trained); or
            ``"zeros"``. With zeros a mean over the sequence, normalised as embedding pipelines do, is exactly the mean
            over the tokens kept to the end.
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
                raise PlanError(f"PrunePlan.stages must hold Stage objects, not {stage!r}.")
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "scorer", ScorerSpec.of(self.scorer))
        if not isinstance(self.protect, Protect):
            raise PlanError(f"PrunePlan.protect must be a Protect object, not {self.protect!r}.")
        if self.restore not in RESTORES:
            raise PlanError(f"PrunePlan.restore must be one of {', '.join(RESTORES)}, not {self.restore!r}.")
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
        if isinstance(layers, (int, str)) or not isinstance(layers, Sequence) or not layers:
            raise PlanError(f"layers must be a non-empty list of block numbers, not {layers!r}.")
        if isinstance(keep, Sequence) and not isinstance(keep, str):
            if len(keep) != len(layers):
                raise PlanError(f"keep lists {len(keep)} shares for {len(layers)} layers; give one for each.")
            keeps = [as_fraction(k, "keep") for k in keep]
        else:
            share = as_fraction(keep, "keep")
            keeps = [share ** (i + 1) for i in range(len(layers))]
        if isinstance(protect, Mapping):
            protect = _from_mapping(Protect, protect, "protect")
        stages = tuple(Stage(layer, k) for layer, k in zip(layers, keeps, strict=True))
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
        each = max(1, round(3 * num_layers / 32))
        start, step = each if start is None else start, each if step is None else step
        share, rest = as_fraction(ratio, "ratio"), as_fraction(local, "local")
        if _as_index(start, "start") >= num_layers or _as_index(step, "step") < 1 or num_stages < 1:
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
        if version != FORMAT_VERSION:
            raise PlanError(f"The plan has format version {version}; this prunepass reads {FORMAT_VERSION}. Update it.")
        if "stages" not in data:
            raise PlanError("The plan has no 'stages'.")
        if not isinstance(data["stages"], Sequence) or isinstance(data["stages"], str):
            raise PlanError("The plan's 'stages' must be a list.")
        data["stages"] = tuple(_from_mapping(Stage, s, f"stages[{i}]") for i, s in enumerate(data["stages"]))
        if "protect" in data:
            data["protect"] = _from_mapping(Protect, data["protect"], "protect")
        plan: PrunePlan = _from_mapping(cls, {**data, "weights": dict(weights or {})}, "the plan")
        return plan

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """A plan from the text of `to_json`. Raises `PlanError` naming what is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise PlanError(f"The plan is not valid JSON: {e}") from None
        return cls.from_dict(data)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``prunepass.json`` and, where there are trained weights, ``predictors.safetensors``."""
        from prunepass.plan_files import write

        write(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PrunePlan:
        """Read a folder written by `save_pretrained`, or one of the plans that come with prunepass, by its name
        (`prunepass.plan_files.shipped`). Nothing is unpickled.

        Raises:
            PlanError: no such folder or no plan in it.
            WeightsError: the weights file is damaged or was not written by prunepass.
        """
        from prunepass.plan_files import read

        return read(Path(folder))


def _same_weights(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    if one.keys() != two.keys():
        return False
    return all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool((a == b).all()))
        for a, b in ((one[key], two[key]) for key in one)
    )


def _from_mapping(cls: Any, data: Any, where: str) -> Any:
    """``cls(**data)`` with an error that names the wrong key and the nearest right one."""
    from dataclasses import fields

    if not isinstance(data, Mapping):
        raise PlanError(f"{where} must be a JSON object, not {data!r}.")
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise PlanError(unknown_key(key, known, where))
    try:
        return cls(**data)
    except TypeError as e:
        missing = [f.name for f in fields(cls) if f.name not in data and f.name in str(e)]
        raise PlanError(f"{where} lacks {', '.join(missing) or 'a field'} ({e}).") from None


def unknown_key(key: str, known: Sequence[str], where: str) -> str:
    """The message for an unknown key: what it is, the nearest known name, and all of them."""
    import difflib

    near = difflib.get_close_matches(str(key), known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown key {key!r} in {where}.{guess} Known: {', '.join(known)}."
