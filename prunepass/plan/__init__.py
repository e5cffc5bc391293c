"""Plans: what to prune, where and how much; read from whatever a caller gives, kept in folders."""

from prunepass.plan.plan import (
    MAX_DENOMINATOR,
    Protect,
    PrunePlan,
    ScorerSpec,
    Stage,
    as_fraction,
    kept_count,
    protected_last,
    share_of,
    unknown_key,
)

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
