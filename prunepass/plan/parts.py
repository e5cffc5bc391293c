"""The parts of a plan: which tokens are protected, what scores them, and one place where others leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

from prunepass.errors import PlanError
from prunepass.plan.values import MAX_DENOMINATOR, as_flag, as_fraction, as_index, as_json, as_list, as_options, shown

if TYPE_CHECKING:
    from prunepass.plan.annotations import Leave, OnlyIds, Segment, Share

__all__ = ["Protect", "ProtectLike", "ScorerLike", "ScorerSpec", "Stage"]

#: how tokens leave
LEAVES = ("drop", "merge")
SEGMENTS = ("first", "second")
#: what may be given: a name, or a mapping with the name and the options
ScorerLike: TypeAlias = Union["ScorerSpec", str, Mapping[str, Any]]
ProtectLike: TypeAlias = Union["Protect", Mapping[str, Any]]


@dataclass(frozen=True, repr=False)
class Protect:
    """Tokens that are kept before any other.

    Args:
        first: number of live tokens at the start of each row ([CLS], attention sinks).
        last: number of live tokens at the end of each row (the last prompt token of a decoder).
        token_ids: ids that are kept wherever they stand ([SEP], a marker). Where a row holds more of them than its
            budget allows, the earlier ones are kept.
        last_share: share of each row, counted from its end, in [0, 1) (SDTP's "local" tokens: 1/10). The larger of
            ``last`` and this share holds.
        segment: "first" or "second": this part of a pair is kept, such as the question before its passage. The
            model's ``token_type_ids`` say which part a token belongs to; where the model takes none, the first of
            ``token_ids`` in a row ends its first part. A row of one part has nothing to protect so. Where a part is
            longer than the budget, its earlier tokens are kept.
        only_ids: for vision-language models: only tokens of these ids may leave, and a stage keeps its
            share of those. Empty for the image and video tokens that the model's configuration names; "any" where text
            may leave, too.
    """

    first: int = 1
    last: int = 0
    token_ids: tuple[int, ...] = ()
    last_share: Fraction = Fraction(0)
    segment: Segment | None = None
    only_ids: tuple[int, ...] | Literal["any"] = ()

    if TYPE_CHECKING:  # what may be given; the fields say what is held

        def __init__(
            self,
            first: int = 1,
            last: int = 0,
            token_ids: Iterable[int] = (),
            last_share: Share = 0,
            segment: Segment | None = None,
            only_ids: OnlyIds = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", as_index(self.first, "Protect.first"))
        object.__setattr__(self, "last", as_index(self.last, "Protect.last"))
        ids = as_list(self.token_ids, "Protect.token_ids", "token ids")
        object.__setattr__(self, "token_ids", tuple(as_index(i, "Protect.token_ids") for i in ids))
        share = as_fraction(self.last_share, "Protect.last_share")
        if not 0 <= share < 1:
            raise PlanError(f"Protect.last_share must lie in [0, 1), not {shown(self.last_share)}.")
        object.__setattr__(self, "last_share", share)
        if self.segment is not None and self.segment not in SEGMENTS:
            known = " or ".join(f'"{name}"' for name in SEGMENTS)
            raise PlanError(f"Protect.segment must be {known}, or None, not {shown(self.segment)}.")
        if not isinstance(self.only_ids, str) or self.only_ids != "any":
            leaving = as_list(self.only_ids, "Protect.only_ids", 'token ids, or "any"')
            object.__setattr__(self, "only_ids", tuple(as_index(i, "Protect.only_ids") for i in leaving))

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in _UNSAID}
        parts = [f"{k}={shown(str(v) if k == 'last_share' else v)}" for k, v in given.items() if v != _UNSAID[k]]
        return f"Protect({', '.join(parts)})"

    @property
    def by_content(self) -> bool:
        """Whether tokens are protected by what they are, besides those protected by where they stand."""
        return bool(self.token_ids) or self.segment is not None

    @property
    def restricts(self) -> bool:
        """Whether only tokens of some ids may leave."""
        return bool(self.only_ids) and self.only_ids != "any"

    @property
    def always_last(self) -> int:
        """Number of tokens protected at the end of a row of any length; of a row that has fewer, all are."""
        return self.last or (1 if self.last_share else 0)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a plan's JSON."""
        out: dict[str, Any] = {
            "first": self.first,
            "last": self.last,
            "token_ids": list(self.token_ids),
            "last_share": str(self.last_share),
        }
        if self.segment is not None:  # plans without it stay as they were
            out["segment"] = self.segment
        if self.only_ids:
            out["only_ids"] = self.only_ids if self.only_ids == "any" else list(self.only_ids)
        return out


_UNSAID = {"first": 1, "last": 0, "token_ids": (), "last_share": 0, "segment": None, "only_ids": ()}


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"ScorerSpec({shown(str(self))})"

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True, repr=False)
class Stage:
    """One place where tokens leave.

    Args:
        layer: 0-based block that the stage stands before (or after whose attention it stands: ``after_attention``).
        keep: share in (0, 1] of the row's *original* live tokens that is kept from here on; held as an exact fraction.
        scorer: name or spec of the scorer; ``None`` takes the plan's.
        after_attention: prune between the block's attention and its feed-forward part (as ToP's gates do).
        leave: "drop", or "merge": each token that leaves is averaged into the kept one whose state (or key, see the
            scorer "likeness") is nearest by cosine, weighted by how many original tokens each state stands for. In a
            causal model that one must stand behind it; where none does, the token is dropped.
    """

    layer: int
    keep: Fraction
    scorer: ScorerSpec | None = None
    after_attention: bool = False
    leave: Leave = "drop"

    if TYPE_CHECKING:

        def __init__(
            self,
            layer: int,
            keep: Share,
            scorer: ScorerLike | None = None,
            after_attention: bool = False,
            leave: Leave = "drop",
        ) -> None: ...

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
        if not isinstance(self.leave, str) or self.leave not in LEAVES:
            raise PlanError(f"Stage.leave must be one of {', '.join(LEAVES)}, not {shown(self.leave)}.")

    def __repr__(self) -> str:
        scorer = "" if self.scorer is None else f", {shown(str(self.scorer))}"
        after = ", after_attention=True" if self.after_attention else ""
        leave = "" if self.leave == "drop" else f", leave={self.leave!r}"
        return f"Stage({self.layer}, '{self.keep}'{scorer}{after}{leave})"

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
        if self.leave != "drop":
            out["leave"] = self.leave
        return out
