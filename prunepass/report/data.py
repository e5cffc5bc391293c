"""What a plan does to a model, in figures: the data behind `prunepass.explain`, as text, JSON and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunepass.cost.corpus import CorpusFlops
from prunepass.errors import PlanError, RefusalError
from prunepass.plan import PrunePlan

__all__ = [
    "AgreementRow",
    "BlockRow",
    "Drawn",
    "Exact",
    "Flops",
    "FusionRow",
    "Fusions",
    "Measured",
    "PartFlops",
    "PassRow",
    "Picture",
    "Refusal",
    "ReportData",
    "Sentence",
    "StageRow",
    "WholeFlops",
]


@dataclass(frozen=True)
class BlockRow:
    """One block of the model.

    Attributes:
        path: module path (``encoder.layer.3``), "" where the graph does not say.
        attention: how the graph computes it: ``scaled_dot_product_attention``, or ``softmax`` where it is spelled out.
        tokens_in, tokens_out: tokens in its attention and after it, as a formula in the length S.
        count_in, count_out: those formulas at the example's length.
        dense_flops, pruned_flops: FLOPs of the block on the example, without the work of pruning itself.
    """

    index: int
    path: str
    attention: str
    tokens_in: str
    tokens_out: str
    count_in: int
    count_out: int
    dense_flops: int
    pruned_flops: int


@dataclass(frozen=True)
class StageRow:
    """One stage of the plan, as placed. ``kept`` is a formula in S, ``count`` its value at the example's length."""

    index: int
    place: str
    path: str
    scorer: str
    keep: str
    kept: str
    count: int


@dataclass(frozen=True)
class PassRow:
    """One pass: the sites it changed, the nodes it left in the graph, and the seconds it took."""

    name: str
    changes: int
    nodes_added: int
    seconds: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of both graphs.

    Attributes:
        rows, tokens: size of the corpus of lengths (of the example, where none was given).
        max_length: length of the first denominator.
        batch_size: rows a batch in the corpus.
        dense, pruned: over that corpus.
        scoring: FLOPs that the scorers add on the example; they are part of ``pruned``.
        moved: elements that the inserted nodes (sorts, gathers, masks) write on the example; these are no FLOPs.
        example_dense, example_pruned: on the example as it is.
    """

    rows: int
    tokens: int
    max_length: int
    batch_size: int
    dense: CorpusFlops
    pruned: CorpusFlops
    example_dense: int
    example_pruned: int
    scoring: int
    moved: int


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of a model on the example, before and after; ``part`` is a module path, or says what it is."""

    part: str
    dense: int
    pruned: int


@dataclass(frozen=True)
class WholeFlops:
    """FLOPs of a model of several parts on the example, counted on what runs; ``dense`` and ``pruned`` are the sums."""

    parts: tuple[PartFlops, ...]
    dense: int
    pruned: int

    @classmethod
    def of(cls, parts: Sequence[PartFlops]) -> WholeFlops:
        """The parts and their sums."""
        return cls(tuple(parts), sum(p.dense for p in parts), sum(p.pruned for p in parts))


@dataclass(frozen=True)
class Exact:
    """The dense model without the tokens that no result needs: every value stays what it is, and no token is pruned.

    Attributes:
        flops: over the corpus.
        example: FLOPs on the example as it is.
        blocks: numbers of the blocks that compute less than in the dense model.
        block_flops: FLOPs of each block on the example, in order.
        layers: module paths of the layers that compute less, where some are no block of their own: layers that attend
            to keys of an earlier one belong to its block.
        in_pruned: whether the pruned model, too, does without what no result needs of it.
    """

    flops: CorpusFlops
    example: int
    blocks: tuple[int, ...]
    block_flops: tuple[int, ...]
    layers: tuple[str, ...]
    in_pruned: bool


@dataclass(frozen=True)
class FusionRow:
    """How many operators of one kind the runtime runs as one fused unit, before and after."""

    kind: str
    dense: int
    pruned: int


@dataclass(frozen=True)
class Fusions:
    """The fusions a target keeps; ``counts`` says what is counted there, ``precision`` what it computes in."""

    target: str
    counts: str
    rows: tuple[FusionRow, ...]
    precision: str = ""


@dataclass(frozen=True)
class AgreementRow:
    """How near one output of the pruned model is to the dense model's: cosines, of the vectors and of their mean over a
    row's tokens (None where the output has no sequence axis)."""

    output: str
    cosine: float
    pooled_cosine: float | None


@dataclass(frozen=True)
class Measured:
    """Time and agreement as `prunepass.report.bench.bench` measured them: medians in milliseconds of a batch."""

    target: str
    precision: str
    texts: int
    dense_ms: float
    pruned_ms: float
    speedup: float
    agreement: tuple[AgreementRow, ...]


@dataclass(frozen=True)
class Refusal:
    """Why the model was not pruned: the reason, the module path in the way, what to do, and what is at fault: the
    "model", which cannot be pruned so, or the "plan", which fits no such model."""

    reason: str
    where: str | None
    hint: str | None
    fault: str = "model"

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """From what a pass raised; of an error other than `RefusalError` the text alone is known."""
        if isinstance(error, RefusalError):
            return cls(error.reason, error.where, error.hint)
        return cls(str(error), None, None, "plan" if isinstance(error, PlanError) else "model")


@dataclass(frozen=True)
class Sentence:
    """A row of real text with the last block each token was in.

    Attributes:
        words: the tokens, in order.
        last_block: index of the last block that each token took part in; -1 for none. A stage after a block's
            attention drops tokens out of that block.
    """

    words: tuple[str, ...]
    last_block: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """What a stage does to the patches of a `Picture`.

    Attributes:
        place: of the stage, in words.
        kept: numbers of the patches that are left, row by row from 0.
        merges: whether those that leave are averaged into them.
    """

    place: str
    kept: tuple[int, ...]
    merges: bool


@dataclass(frozen=True)
class Picture:
    """An image of the example, and the patches that each stage keeps.

    Attributes:
        png: a PNG file in base64, pixel values stretched to what can be shown.
        rows, columns: of patches.
        stages: those that prune, in order.
    """

    png: str
    rows: int
    columns: int
    stages: tuple[Drawn, ...]


@dataclass(frozen=True, repr=False)
class ReportData:
    """What `prunepass.explain` found, as data.

    Where several parts of a model are pruned each by a plan of its own, or one that stands inside a larger model,
    ``parts`` has a report on each, and ``plan`` and the tables are empty.

    Attributes:
        plan: what was pruned by.
        batch, length: rows of the example, and tokens of a row; of several parts, of the prompt or the first stream.
        refusals: why the model was not pruned as planned; where there is one, the pruned figures are missing.
        plan_source: where the plan is from, in words.
        exact: what is saved with no token pruned; None where results need every token.
        streams: the residual streams of a model that makes tokens itself, or has several, in words.
        picture: of a model that makes its tokens of the patches of an image.
        measured: time and agreement, where `BenchResult.added_to` put them in.
        part: of a report on a part: the path of its module in the model.
        parts: the reports on the parts that have a plan.
        whole: FLOPs of all parts; None for a model that is pruned as one, and where a part was refused.
    """

    model: str
    plan: PrunePlan
    batch: int
    length: int
    blocks: tuple[BlockRow, ...] = ()
    stages: tuple[StageRow, ...] = ()
    flops: Flops | None = None
    passes: tuple[PassRow, ...] = ()
    fusions: Fusions | None = None
    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    sentence: Sentence | None = None
    plan_source: str = ""
    measured: Measured | None = None
    streams: tuple[str, ...] = ()
    picture: Picture | None = None
    part: str = ""
    parts: tuple[ReportData, ...] = ()
    whole: WholeFlops | None = None
    exact: Exact | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values: numbers, text, lists and mappings."""
        fields = {k: v for k, v in vars(self).items() if k != "plan"}
        return {**{k: _plain(v) for k, v in fields.items()}, "plan": self.plan.to_dict()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, ReportData):
        return value.to_dict()
    if hasattr(value, "__dataclass_fields__"):
        return {k: _plain(v) for k, v in asdict(value).items()}
    return value
