"""How many tokens a share keeps, by whole numbers that every runtime computes exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunepass.plan.parts import Protect

__all__ = ["MAX_LENGTH", "count_of_shares", "kept_count", "protected_last", "share_of"]

MAX_LENGTH = 2**20
#: whole numbers up to here are exact in float32
_EXACT = 2**24
_DIGIT = 2**7


def kept_count(
    n: Any,
    keep: Fraction,
    protect: Protect,
    *,
    minimum: Any = min,
    maximum: Any = max,
    longest: int = MAX_LENGTH,
) -> Any:
    """Number of tokens kept of ``n``: ``min(n, max(first + last, ceil(keep * n)))``, in integer arithmetic only.

    ``n`` may be an int, a SymInt or an integer tensor; for the last two pass the fitting ``minimum`` and ``maximum``.
    ``longest``: see `share_of`.
    """
    return _within(n, share_of(n, keep, longest), protect, minimum, maximum)


def count_of_shares(
    n: Any,
    over: Any,
    under: Any,
    most: tuple[int, int],
    protect: Protect,
    *,
    minimum: Any = min,
    maximum: Any = max,
    longest: int = MAX_LENGTH,
) -> Any:
    """`kept_count` for shares ``over / under`` that are no constants: tensors of whole numbers, read from a table.

    Args:
        most: the largest values that ``over`` and ``under`` may have, for which the form of the division is chosen.
        longest: see `share_of`.
    """
    return _within(n, _divided(n, over, under, most, longest), protect, minimum, maximum)


def _within(n: Any, count: Any, protect: Protect, minimum: Any, maximum: Any) -> Any:
    """``min(n, max(first + last, count))``."""
    last = protected_last(n, protect, maximum=maximum)
    # ceil(keep * n) of a positive keep already lies in [1, n] for n >= 1, and is 0 for n = 0.
    if protect.first + protect.last <= 1 and not protect.last_share:
        return count
    return minimum(n, maximum(count, last + protect.first))


def protected_last(n: Any, protect: Protect, *, maximum: Any = max) -> Any:
    """Number of tokens protected at the end of a row of ``n``: ``max(last, ceil(last_share * n))``."""
    if not protect.last_share:
        return protect.last
    share = share_of(n, protect.last_share)
    return maximum(share, protect.last) if protect.last else share


def share_of(n: Any, share: Fraction, longest: int = MAX_LENGTH) -> Any:
    """``ceil(share * n)`` for an ``n`` of up to ``longest`` and a share in [0, 1], by whole numbers below 2^24 alone.

    Runtimes may hold whole numbers in 32 bits and divide them in float32 (OpenVINO's CPU plugin does both); below 2^24
    that is exact. So the division is done in steps, as by hand, where the product would be larger; of short rows it is
    not. There is no ``%`` in it, as converters may not know that of sizes.
    """
    return _divided(n, share.numerator, share.denominator, (share.numerator, share.denominator), longest)


def _divided(n: Any, over: Any, under: Any, most: tuple[int, int], longest: int) -> Any:
    """``ceil(n * over / under)``, see `share_of`; ``most`` is an upper bound of ``over`` and of ``under``."""
    if most[0] * longest + most[1] <= _EXACT:
        return (n * over + (under - 1)) // under
    whole = n // under
    rest = n - whole * under
    if most[0] * most[1] <= _EXACT:
        return whole * over + (rest * over + (under - 1)) // under
    digit = rest // _DIGIT  # rest < 2^14: its higher and its lower half, each below 2^7
    product = digit * over
    carried = product // under
    remainder = (product - carried * under) * _DIGIT + (rest - digit * _DIGIT) * over
    return whole * over + carried * _DIGIT + (remainder + (under - 1)) // under
