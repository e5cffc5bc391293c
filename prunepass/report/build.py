"""`explain`: what a plan does to a model. Figures come from shapes; only the sentence is run on real numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunepass.cost import FlopCounter, corpus_flops
from prunepass.cost.blocks import block_of_nodes
from prunepass.errors import OptionError, PlanError, PruneError, RefusalError
from prunepass.graph.blocks import Block
from prunepass.graph.capture import Captured, Inputs, capture_module, export_again
from prunepass.graph.vision import refuse_images
from prunepass.graph.wrappers import unwrapped
from prunepass.passes.default_plan import head_warning
from prunepass.passes.segments import TYPES_NAME
from prunepass.pipeline import PruneResult, analyse, prune, prune_graph
from prunepass.plan import PrunePlan, kept_count
from prunepass.plan.choice import AnyPlan, alone, choose
from prunepass.report.data import (
    BlockRow,
    Flops,
    FusionRow,
    Fusions,
    PassRow,
    Refusal,
    Sentence,
    StageRow,
)
from prunepass.report.exact import exact_savings
from prunepass.report.made import MadeTokens, stream_lines
from prunepass.report.picture import picture_of
from prunepass.report.precision import computes_in
from prunepass.report.report import Report
from prunepass.report.tokens import count_formula, last_blocks, live_tokens, protection_warnings, tokens_at

__all__ = ["Report", "explain"]

BATCH_SIZE = 32


def explain(
    model: nn.Module,
    plan: AnyPlan,
    example_inputs: Inputs | Tensor,
    *,
    target: str | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    tokenizer: Any = None,
    text: str | None = None,
) -> Report:
    """What ``plan`` does to ``model``: blocks, stages, tokens, FLOPs, passes, fusions, and a sentence token by token.

    Args:
        plan: a `PrunePlan`, a folder or JSON text of one. None takes the plan in the folder that the model was loaded
            from, and where there is none, the default one, which "default" always does.
        example_inputs: keyword arguments (a mapping) or positional ones; the figures "on the example" are at its shape.
        target: a runtime ("openvino", ...): count the fusions it keeps, which means compiling both graphs for it. Of a
            plan that prunes nothing, the pruned figures are then those of `torch.compile`, see `Report.exact`; without
            a target they are the model's, which `prune` and `export` leave as it is.
        lengths: live tokens of each row of a corpus, for the FLOPs; those of the example where it is not given.
        batch_size: rows a batch in that corpus.
        max_length: what the first denominator pads to; else what the tokenizer, the graph or the config allow.
        tokenizer: of transformers; shows tokens as words, and is needed for ``text``.
        text: a sentence to follow through the blocks; the example's first row where it is not given.

    Returns:
        A `Report`. A plan that the model refuses is no error here: the report says why. Its ``exact`` is what the dense
        model takes without the tokens that no result needs, and None where results need them all.

    Raises:
        CaptureError: the model cannot be traced.
        RefusalError: it is pruned already, or its code cannot be read.
        OptionError: ``model`` is no model, inputs that cannot be its own, ``text`` without a tokenizer, a length beyond
            the maximum, an unknown target.
    """
    if text is not None and tokenizer is None:
        raise OptionError("explain(text=...) needs the tokenizer that turns the text into ids: pass tokenizer=.")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    model = unwrapped(model, "explain")
    choice = alone(choose(plan, model))
    refuse_images(model, example_inputs)
    captured = capture_module(model, example_inputs)
    asked = choice.plan if isinstance(choice.plan, PrunePlan) else choice.plan.completed(PrunePlan(()))
    example = _Example.of(captured, example_inputs, asked.stream)
    report = Report(type(model).__name__, asked, example.batch, example.length, plan_source=choice.source)
    try:
        with choice.blamed():
            # `prune` gives back a model that its plan leaves whole; what runs on a target is `torch.compile`'s.
            result = prune_graph(captured.graph_module, choice.plan, metadata=False, exact=target is not None)
    except (RefusalError, PlanError) as error:
        return _refused(report, captured, example, error)

    dense = FlopCounter(captured.graph_module, batch=example.batch, length=example.size, stream=asked.stream)
    pruned = FlopCounter(result.graph_module, batch=example.batch, length=example.size, stream=asked.stream)
    corpus = [int(n) for n in (example.lengths if lengths is None else lengths)]
    maximum = max_length or _max_length(model, tokenizer, dense, corpus)
    plan = result.plan
    # A plan that prunes nothing gives the graph back unread.
    blocks = result.blocks or analyse(captured.graph_module, asked.stream)[2]
    row = _sentence_inputs(example, tokenizer, text, maximum)
    alive, made = _alive(captured, plan, row), example.made
    block_rows = _block_rows(blocks, plan, example, dense, pruned)
    places, shape = block_of_nodes(captured.graph_module.graph, blocks), (example.batch, example.size)
    of_corpus: dict[str, Any] = {"batch_size": batch_size, "max_length": maximum}
    return replace(
        report,
        streams=stream_lines(captured.graph_module, result.inputs),
        plan=plan,
        blocks=block_rows,
        exact=exact_savings(result, dense, places, block_rows, shape, corpus, **of_corpus),
        stages=_stage_rows(result, example.length),
        flops=_flops(dense, pruned, example, corpus, batch_size, maximum),
        passes=_pass_rows(result),
        fusions=_fusions(target, result, captured, model) if target else None,
        warnings=(*protection_warnings(plan, example.token_ids, example.live, example.types), *_head_warnings(result)),
        sentence=_sentence(plan, row, alive, tokenizer, len(blocks), made),
        picture=None if made is None else picture_of(plan, made, row, alive),
    )


def _head_warnings(result: PruneResult) -> list[str]:
    warning = head_warning(result.plan, result.reads) if result.restored else None
    return [warning] if warning else []


def _refused(report: Report, captured: Captured, example: _Example, error: Exception) -> Report:
    """The report without figures of a pruned model; the blocks stay, where it was not they that were refused."""
    refusals = (Refusal.of(error),)
    stream = report.plan.stream
    try:
        blocks = analyse(captured.graph_module, stream)[2]
    except PruneError:
        return replace(report, refusals=refusals)
    dense = FlopCounter(captured.graph_module, batch=example.batch, length=example.size, stream=stream)
    unpruned = PrunePlan(())
    return replace(report, refusals=refusals, blocks=_block_rows(blocks, unpruned, example, dense, dense))


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


def _block_rows(
    blocks: Sequence[Block], plan: PrunePlan, example: _Example, dense: FlopCounter, pruned: FlopCounter
) -> tuple[BlockRow, ...]:
    places = block_of_nodes(dense.graph_module.graph, blocks)
    dense_flops = _by_block(dense.per_node(example.batch, example.size), places)
    pruned_flops = _by_block(pruned.per_node(example.batch, example.size), places)
    rows = []
    for block in blocks:
        share_in, share_out = (tokens_at(plan, block.index, after_attention=after) for after in (False, True))
        row = BlockRow(
            index=block.index,
            path=block.path,
            attention=_attention_kind(block.attentions),
            tokens_in=count_formula(share_in, plan.protect),
            tokens_out=count_formula(share_out, plan.protect),
            count_in=int(kept_count(example.length, share_in, plan.protect)),
            count_out=int(kept_count(example.length, share_out, plan.protect)),
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


def _stage_rows(result: PruneResult, length: int) -> tuple[StageRow, ...]:
    plan = result.plan
    rows = []
    for site in result.sites:
        stage = site.stage
        scorer = str(plan.scorer_of(site.index))
        kept = count_formula(stage.keep, plan.protect)
        count = int(kept_count(length, stage.keep, plan.protect))
        rows.append(StageRow(site.index, stage.place, site.block.path, scorer, str(stage.keep), kept, count))
    return tuple(rows)


def _pass_rows(result: PruneResult) -> tuple[PassRow, ...]:
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


def _fusions(target: str, result: PruneResult, captured: Captured, model: nn.Module) -> Fusions:
    from prunepass.backends import fusion_counts

    before = fusion_counts(target, captured.exported)
    changed = result.graph_module is not captured.graph_module
    left = export_again(result.graph_module, captured.exported, 0) if changed and not result.sites else None
    after = fusion_counts(target, left or prune(captured.exported, result.plan))
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


def _sentence(
    plan: PrunePlan,
    inputs: Mapping[str, Any],
    alive: Sequence[Tensor],
    tokenizer: Any,
    num_blocks: int,
    made: MadeTokens | None,
) -> Sentence:
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


def _alive(captured: Captured, plan: PrunePlan, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Run the model in mask mode as far as the last stage: one [B, S] bool for each stage that prunes."""
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
