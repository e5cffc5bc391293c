"""What may be written where a share or a name is asked for. For annotations only."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Literal, SupportsFloat, TypeAlias

__all__ = ["Format", "Leave", "Mode", "OnlyIds", "Pooling", "Restore", "Segment", "Share"]

#: each is held as an exact fraction: 0.1, "1/10", Fraction(1, 10), a number of numpy
Share: TypeAlias = int | float | str | Fraction | Decimal | SupportsFloat
Restore: TypeAlias = Literal["last", "lens", "mean", "zeros", "none"]
#: token ids, or all of them
OnlyIds: TypeAlias = Iterable[int] | Literal["any"]
Segment: TypeAlias = Literal["first", "second"]
Leave: TypeAlias = Literal["drop", "merge"]
Mode: TypeAlias = Literal["gather", "mask"]
Format: TypeAlias = Literal["openvino", "onnx", "pt2"]
Pooling: TypeAlias = Literal["mean", "cls", "last"]
