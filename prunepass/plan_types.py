"""What may be written where a plan, a share, a scorer or a name is asked for. For annotations only."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias, Union

if TYPE_CHECKING:
    from prunepass.plan import Protect, ScorerSpec

__all__ = ["Format", "Mode", "ProtectLike", "Restore", "ScorerLike", "Share"]

#: each is held as an exact fraction: 0.1, "1/10", Fraction(1, 10), a number of numpy
Share: TypeAlias = int | float | str | Fraction | Decimal | SupportsFloat
#: a name, or a mapping with the name and the options
ScorerLike: TypeAlias = Union["ScorerSpec", str, Mapping[str, Any]]
ProtectLike: TypeAlias = Union["Protect", Mapping[str, Any]]
Restore: TypeAlias = Literal["last", "lens", "mean", "zeros"]
Mode: TypeAlias = Literal["gather", "mask"]
Format: TypeAlias = Literal["openvino", "onnx", "pt2"]
