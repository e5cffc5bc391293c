"""What a plan does to one traced graph. Figures come from shapes; only the sentence is run on real numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from prunepass.cost import FlopCounter, corpus_flops
from prunepass.cost.blocks import block_of_nodes
from prunepass.errors import PlanError, PruneError, RefusalError
from prunepass.graph.blocks import Block
from prunepass.graph.capture import Captured, Inputs, export_again
from prunepass.passes.default_plan import head_warning
from prunepass.passes.segments import TYPES_NAME
from prunepass.pipeline import PruneResult, analyse, prune_graph, prune_program
from prunepass.plan import PrunePlan
from prunepass.plan.choice import Choice
from prunepass.report.data import BlockRow, Flops, FusionRow, Fusions, PassRow, Refusal, Sentence, StageRow
from prunepass.report.exact import exact_savings
from prunepass.report.made import MadeTokens, stream_lines
from prunepass.report.picture import picture_of
from prunepass.report.precision import computes_in
from prunepass.report.report import Report
from prunepass.report.tokens import TokenCounts, last_blocks, live_tokens, protection_warnings, tokens_at

__all__ = [
    "BATCH_SIZE",
    "Asked",
    "alive_tokens",
    "block_rows",
    "fusions_of",
    "head_warnings",
    "pass_rows",
    "refused",
    "report_on",
    "sentence_of",
    "stage_rows",
]

BATCH_SIZE = 32


@dataclass(frozen=True)
class Asked:
    """What `explain` was asked to count besides, see there."""

    target: str | None = None
    lengths: Sequence[int] | None = None
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    tokenizer: Any = None
    text: str | None = None


def report_on(
    model: nn.Module, choice: Choice, captured: Captured, example_inputs: Inputs, asked: Asked
) -> tuple[Report, PruneResult | None]:
    """The report on a model that is one graph, and the pruned graph; None where the plan was refused.

    Args:
        choice: a single plan.
        captured: the model, traced.

    Raises:
        OptionError: a length beyond the maximum, an unknown target.
    """
    known = choice.plan if isinstance(choice.plan, PrunePlan) else choice.plan.completed(PrunePlan(()))
    example = _Example.of(captured, example_inputs, known.stream)
    report = Report(type(model).__name__, known, example.batch, example.length, plan_source=choice.source)
    shape = example.batch, example.size
    flops_of = partial(FlopCounter, batch=shape[0], length=shape[1], stream=known.stream)
    try:
        with choice.blamed():
            # `prune` gives back a model that its plan leaves whole; what runs on a target is `torch.compile`'s.
            result = prune_graph(captured.graph_module, choice.plan, metadata=False, exact=asked.target is not None)
    except (RefusalError, PlanError) as error:
        counts = TokenCounts(example.length, known.protect)
        return refused(report, captured, counts, lambda: flops_of(captured.graph_module).per_node(*shape), error), None

    dense, pruned = flops_of(captured.graph_module), flops_of(result.graph_module)
    corpus = [int(n) for n in (example.lengths if asked.lengths is None else asked.lengths)]
    maximum = asked.max_length or _max_length(model, asked.tokenizer, dense, corpus)
    plan, counts = result.plan, TokenCounts(example.length, result.plan.protect)
    # A plan that prunes nothing gives the graph back unread.
    blocks = result.blocks or analyse(captured.graph_module, known.stream)[2]
    row = _sentence_inputs(example, asked.tokenizer, asked.text, maximum)
    alive, made = alive_tokens(captured, plan, row), example.made
    rows = block_rows(captured.graph_module, blocks, plan, counts, dense.per_node(*shape), pruned.per_node(*shape))
    places = block_of_nodes(captured.graph_module.graph, blocks)
    of_corpus: dict[str, Any] = {"batch_size": asked.batch_size, "max_length": maximum}
    report = replace(
        report,
        streams=stream_lines(captured.graph_module, result.inputs),
        plan=plan,
        blocks=rows,
        exact=exact_savings(result, dense, places, rows, shape, corpus, **of_corpus),
        stages=stage_rows(result, counts),
        flops=_flops(dense, pruned, example, corpus, asked.batch_size, maximum),
        passes=pass_rows(result),
        fusions=_fusions(asked.target, model, captured, result),
        warnings=(*protection_warnings(plan, example.token_ids, example.live, example.types), *head_warnings(result)),
        sentence=sentence_of(plan, row, alive, asked.tokenizer, len(blocks), made),
        picture=None if made is None else picture_of(plan, made, row, alive),
    )
    return report, result


def head_warnings(result: PruneResult) -> list[str]:
    """What a head makes of outputs that were restored, where that would spoil it."""
    warning = head_warning(result.plan, result.reads) if result.restored else None
    return [warning] if warning else []


def refused(
    report: Report, captured: Captured, counts: TokenCounts, flops: Callable[[], Mapping[str, int]], error: Exception
) -> Report:
    """The report without figures of a pruned model; the blocks stay, where it was not they that were refused.

    Args:
        flops: counts those of the unpruned graph on the example, by node.
    """
    refusals = (Refusal.of(error),)
    try:
        blocks = analyse(captured.graph_module, report.plan.stream)[2]
    except PruneError:
        return replace(report, refusals=refusals)
    dense = flops()
    rows = block_rows(captured.graph_module, blocks, PrunePlan(()), counts, dense, dense)
    return replace(report, refusals=refusals, blocks=rows)


@dataclass(frozen=True)
class _Example:
    """The example inputs by name, with what the report reads off them.

    Attributes:
        length: tokens of a row.
        size: what the graph's length is counted in: tokens, or the samples of a sound.
        live: [B, tokens] bool.
        made: tokens that the model makes itself.
    """

    inputs: dict[str, Any]
    batch: int
    length: int
    size: int
    live: Tensor
    made: MadeTokens | None = None

    @classmethod
    def of(cls, captured: Captured, example_inputs: Inputs, stream: str | None) -> _Example:
        if isinstance(example_inputs, Mapping):
            inputs = dict(example_inputs)
        else:
            inputs = dict(zip(captured.inputs, example_inputs, strict=False))
        tokens = next(v for v in inputs.values() if isinstance(v, Tensor) and v.dim() >= 2)
        batch, length = tokens.shape[:2]
        made = _made(captured, stream, inputs)
        if made is not None:
            return cls(inputs, batch, made.count, made.size, made.live, made)
        return cls(inputs, batch, length, length, live_tokens(inputs, (batch, length)))

    @property
    def token_ids(self) -> Tensor | None:
        ids = self.inputs.get("input_ids")
        return ids if isinstance(ids, Tensor) else None

    @property
    def types(self) -> Tensor | None:
        types = self.inputs.get(TYPES_NAME)
        return types if isinstance(types, Tensor) else None

    @property
    def lengths(self) -> list[int]:
        if self.made is not None and self.size != self.length:  # of a sound, in samples
            return [max(1, int(n)) for n in live_tokens(self.inputs, (self.batch, self.size)).sum(dim=1)]
        return [max(1, int(n)) for n in self.live.sum(dim=1)]


def _made(captured: Captured, stream: str | None, inputs: Mapping[str, Any]) -> MadeTokens | None:
    try:
        return MadeTokens.of(captured.graph_module, stream, inputs)
    except PruneError:  # the plan or the model is refused then, with the reason
        return None


# -- rows -----------------------------------------------------------------------------------------------------------


def block_rows(
    gm: fx.GraphModule,
    blocks: Sequence[Block],
    plan: PrunePlan,
    counts: TokenCounts,
    dense: Mapping[str, int],
    pruned: Mapping[str, int],
) -> tuple[BlockRow, ...]:
    """A row a block.

    Args:
        gm: the unpruned graph.
        dense, pruned: FLOPs on the example by node, of both graphs.
    """
    places = block_of_nodes(gm.graph, blocks)
    dense_flops, pruned_flops = _by_block(dense, places), _by_block(pruned, places)
    rows = []
    for block in blocks:
        share_in, share_out = (tokens_at(plan, block.index, after_attention=after) for after in (False, True))
        row = BlockRow(
            index=block.index,
            path=block.path,
            attention=_attention_kind(block.attentions),
            tokens_in=counts.formula(share_in),
            tokens_out=counts.formula(share_out),
            count_in=counts.at(share_in),
            count_out=counts.at(share_out),
            dense_flops=dense_flops[block.index],
            pruned_flops=pruned_flops[block.index],
        )
        rows.append(row)
    return tuple(rows)


def _attention_kind(nodes: Sequence[fx.Node]) -> str:
    """``scaled_dot_product_attention``, ``softmax``: the operators that mix the block's tokens, each named once."""
    return ", ".join(sorted({str(n.target).removeprefix("aten.").split(".")[0].strip("_") for n in nodes}))


def _by_block(flops: Mapping[str, int], places: Mapping[str, int]) -> Counter[int]:
    total: Counter[int] = Counter()
    for name, count in flops.items():
        if name in places:
            total[places[name]] += count
    return total


def stage_rows(result: PruneResult, counts: TokenCounts) -> tuple[StageRow, ...]:
    """A row a stage, as placed."""
    plan = result.plan
    rows = []
    for site in result.sites:
        stage = site.stage
        scorer = str(plan.scorer_of(site.index))
        kept = counts.formula(stage.keep), counts.at(stage.keep)
        rows.append(StageRow(site.index, stage.place, site.block.path, scorer, str(stage.keep), *kept))
    return tuple(rows)


def pass_rows(result: PruneResult) -> tuple[PassRow, ...]:
    """A row a pass that ran."""
    added = result.nodes_added()
    return tuple(
        PassRow(name, result.changes.get(name, 0), added.get(name, 0), seconds)
        for name, seconds in result.seconds.items()
    )


def _flops(
    dense: FlopCounter, pruned: FlopCounter, example: _Example, lengths: list[int], batch_size: int, maximum: int
) -> Flops:
    options = {"batch_size": batch_size, "max_length": maximum}
    shape = example.batch, example.size
    inserted = {n.name for n in pruned.graph_module.graph.nodes if "prunepass" in n.meta}
    by_node = pruned.per_node(*shape)
    return Flops(
        rows=len(lengths),
        tokens=sum(lengths),
        max_length=maximum,
        batch_size=batch_size,
        dense=corpus_flops(dense, lengths, **options),
        pruned=corpus_flops(pruned, lengths, **options),
        example_dense=dense.total(*shape),
        example_pruned=sum(by_node.values()),
        scoring=sum(count for name, count in by_node.items() if name in inserted),
        moved=pruned.moved(*shape),
    )


def _max_length(model: nn.Module, tokenizer: Any, counter: FlopCounter, lengths: Sequence[int]) -> int:
    """The smallest bound that the tokenizer, the graph or the config state; without any, the longest row."""
    stated = [
        getattr(tokenizer, "model_max_length", None),
        counter.max_length,
        getattr(getattr(model, "config", None), "max_position_embeddings", None),
    ]
    # A tokenizer without a limit says so by an astronomic one.
    bounds = [n for n in stated if isinstance(n, int) and 0 < n < 10**9]
    return max(min(bounds), max(lengths)) if bounds else max(lengths)


# -- what needs a run -----------------------------------------------------------------------------------------------


def _fusions(target: str | None, model: nn.Module, captured: Captured, result: PruneResult) -> Fusions | None:
    if target is None:
        return None
    dense = captured.exported
    if not result.sites and result.graph_module is not captured.graph_module:
        return fusions_of(target, model, dense, export_again(result.graph_module, dense, 0))
    return fusions_of(target, model, dense, prune_program(dense, Choice(result.plan, "the plan given"))[0])


def fusions_of(target: str, model: nn.Module, dense: ExportedProgram, pruned: ExportedProgram) -> Fusions:
    """What a runtime fuses of both programs of a model, which is compiled for it twice."""
    from prunepass.backends import fusion_counts

    before, after = fusion_counts(target, dense), fusion_counts(target, pruned)
    kinds = {"attention": "attention", "layer_norm": "layer norm", "gelu": "GELU"}
    rows = tuple(FusionRow(label, getattr(before, kind), getattr(after, kind)) for kind, label in kinds.items())
    return Fusions(target, after.counts, rows, computes_in(target, model))


def _sentence_inputs(example: _Example, tokenizer: Any, text: str | None, maximum: int) -> dict[str, Any]:
    """One row of model inputs: the text's, else the example's first row."""
    if text is None:
        return {k: v[:1] if isinstance(v, Tensor) and v.dim() >= 2 else v for k, v in example.inputs.items()}
    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=maximum)
    device = example.live.device
    return {k: v.to(device) for k, v in encoded.items() if k in example.inputs}


def sentence_of(
    plan: PrunePlan,
    inputs: Mapping[str, Any],
    alive: Sequence[Tensor],
    tokenizer: Any,
    num_blocks: int,
    made: MadeTokens | None,
) -> Sentence:
    """The first row of ``inputs``, and how far each of its live tokens came; ``alive`` as `alive_tokens` gives it."""
    if made is not None:
        came = last_blocks(plan, alive, num_blocks, (1, made.count))[0]
        shown = [i for i, here in enumerate(made.live[0].tolist()) if here]
        return Sentence(tuple(made.names[i] for i in shown), tuple(int(came[i]) for i in shown))
    tokens = next(v for v in inputs.values() if isinstance(v, Tensor) and v.dim() >= 2)
    live = live_tokens(inputs, tokens.shape[:2])[0]
    last = last_blocks(plan, alive, num_blocks, tokens.shape[:2])[0]
    words = _words(inputs.get("input_ids"), tokenizer, tokens.shape[1])
    shown = [i for i, here in enumerate(live.tolist()) if here]
    return Sentence(tuple(words[i] for i in shown), tuple(int(last[i]) for i in shown))


def alive_tokens(captured: Captured, plan: PrunePlan, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tokens that each stage that prunes leaves, [B, S] bool: of a run in mask mode as far as the last stage."""
    result = prune_graph(captured.graph_module, plan, mode="mask", metadata=False)
    if not result.sites:
        return []
    graph = result.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    graph.output_node().args = (tuple(nodes[name] for name in result.kept),)
    graph.eliminate_dead_code()
    values = [inputs[name] for name in captured.inputs]
    with torch.no_grad():
        return list(fx.Interpreter(result.graph_module).run(*values, enable_io_processing=False))


def _words(ids: Tensor | None, tokenizer: Any, length: int) -> list[str]:
    """The first row's tokens as words; as ids without a tokenizer, as positions without ids."""
    if ids is None:
        return [str(i) for i in range(length)]
    if tokenizer is None:
        return [str(int(i)) for i in ids[0]]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
